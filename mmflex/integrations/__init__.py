"""mmflex where users have it: in models of the transformers library."""
