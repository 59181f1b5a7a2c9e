"""Clips of frames, read from videos, images or arrays: what the jobs on them share."""
