"""Tables, figures and one page of many stored runs; `task=report` puts them together.

``records`` is what all of it is about; ``folders`` and ``tracked`` read them. A file per figure
holds what it computes and how it is drawn. A new figure is one new file and a line in ``page``.
"""
