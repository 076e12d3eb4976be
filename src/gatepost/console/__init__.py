"""What an operator's browser and monitoring see, served from a process of its own."""
