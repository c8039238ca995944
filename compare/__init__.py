"""Run directories read and set side by side: what differs, which is better, curves, one page.

Reads what a run left behind and writes nothing there; imports no torch.
"""
