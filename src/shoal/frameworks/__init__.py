"""What joins Shoal to the libraries that train for their users; each module needs one of them, and an extra's name."""
