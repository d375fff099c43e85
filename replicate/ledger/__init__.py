"""The claims of papers as data, read and checked."""
