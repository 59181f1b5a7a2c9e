"""Recognising what happens in a video, with a 3D CNN; and the clips that ship with the package."""
