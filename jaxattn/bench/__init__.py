"""This library against its peers, in one run, on this machine."""
