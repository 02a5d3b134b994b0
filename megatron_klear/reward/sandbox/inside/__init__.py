"""What runs inside the sandbox, under its interpreter: nothing but the standard library, Python 3.10 or later.

The modules are sent to the sandbox as text (`sandbox/process.py`), so they import one another by full name only.
"""
