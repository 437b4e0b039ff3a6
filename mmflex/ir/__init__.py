"""What a head may see: token layouts, mask expressions and the pattern algebra."""
