"""Conversation templates: a conversation in, text segments with loss flags out."""

from raylm.data.templates.jinja import ChatTemplate
from raylm.data.templates.segments import Segment

__all__ = ["ChatTemplate", "Segment"]
