"""What is trained: a package for each kind of data, and what these share."""
