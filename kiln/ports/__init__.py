"""What activities and the API need of the world, as protocols.

Adapters implement them; tests may put fakes behind the same contract tests.
"""

from kiln.ports.cloud import Ami, Cloud, ImageDeletion, Marks, Resource, SecurityGroupRequest
from kiln.ports.ledger import BuildBrief, DoomedImage, Footprint, Held, Ledger, LivingImage, Order
from kiln.ports.logs import End, Gap, LogBook, LogLine, LogReading, LogWriting
from kiln.ports.tools import PackerJob, PackerKit, TemplateShelf, TemplateView, Tool, Toolbox, ToolExit, ToolLine

__all__ = [
    "Ami",
    "BuildBrief",
    "Cloud",
    "DoomedImage",
    "End",
    "Footprint",
    "Gap",
    "Held",
    "ImageDeletion",
    "Ledger",
    "LivingImage",
    "LogBook",
    "LogLine",
    "LogReading",
    "LogWriting",
    "Marks",
    "Order",
    "PackerJob",
    "PackerKit",
    "Resource",
    "SecurityGroupRequest",
    "TemplateShelf",
    "TemplateView",
    "Tool",
    "ToolExit",
    "ToolLine",
    "Toolbox",
]
