"""How to compute a mask: token orders, block classification, cost, and the program that ties them together."""
