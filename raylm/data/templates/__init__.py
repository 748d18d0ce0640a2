"""Conversation templates: a conversation in, text segments with loss flags out."""

from raylm.data.templates.conversation import ConversationTemplate, render
from raylm.data.templates.presets import PRESETS
from raylm.data.templates.segments import Segment
from raylm.data.templates.table import ChatTemplate, chat_template, get_template

__all__ = ["PRESETS", "ChatTemplate", "ConversationTemplate", "Segment", "chat_template", "get_template", "render"]
