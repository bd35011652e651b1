"""Repeated parts of a graph, outlined: found, made alike, and named in a program that calls them."""
