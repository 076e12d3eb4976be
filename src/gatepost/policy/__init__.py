"""DECIDE: facts and findings to a verdict.  Pure, total, explainable."""
