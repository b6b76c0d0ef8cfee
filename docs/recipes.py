"""What other libraries have a function for, in ours.

.. include:: recipes.md
"""
