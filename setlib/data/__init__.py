"""Domains: labelled sets of pictures, read as downloaded, decoded, augmented, checked and corrupted."""
