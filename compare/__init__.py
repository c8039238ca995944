"""What runs.py does: reads run directories, compares them, plots their curves, writes a page.

Reads what runs left behind and writes nothing there; imports no torch.
"""
