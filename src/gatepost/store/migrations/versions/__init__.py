"""One module a version; what stands in one is never changed after a release."""
