"""``lastgood report``: one page on a run. Data first (pure functions), then tables and the page around them.

Everything but ``gather`` is pure: what is on disk goes in as values, what the page shows comes out as values.
"""
