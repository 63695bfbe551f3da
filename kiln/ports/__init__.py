"""What activities and the API need of the world, as protocols.

Adapters implement them; tests may put fakes behind the same contract tests.
"""

from kiln.ports.cloud import Ami, Cloud, ImageDeletion, Marks, Resource, SecurityGroupRequest
from kiln.ports.containers import (
    ContainerKit,
    Contexts,
    ContextUpload,
    Engine,
    EnginePool,
    Manifest,
    PublicRegistries,
    Registry,
    ToolJob,
    TransferKit,
)
from kiln.ports.facts import ContextFacts, ImageFacts
from kiln.ports.ledger import (
    BuildBrief,
    ContainerFootprint,
    ContextOrder,
    DoomedImage,
    Errand,
    Footprint,
    Held,
    Ledger,
    LivingImage,
    Order,
    Publication,
)
from kiln.ports.logs import End, Gap, LogBook, LogLine, LogReading, LogWriting
from kiln.ports.tools import PackerJob, PackerKit, TemplateShelf, TemplateView, Tool, Toolbox, ToolExit, ToolLine

__all__ = [
    "Ami",
    "BuildBrief",
    "Cloud",
    "ContainerFootprint",
    "ContainerKit",
    "ContextFacts",
    "ContextOrder",
    "ContextUpload",
    "Contexts",
    "DoomedImage",
    "End",
    "Engine",
    "EnginePool",
    "Errand",
    "Footprint",
    "Gap",
    "Held",
    "ImageDeletion",
    "ImageFacts",
    "Ledger",
    "LivingImage",
    "LogBook",
    "LogLine",
    "LogReading",
    "LogWriting",
    "Manifest",
    "Marks",
    "Order",
    "PackerJob",
    "PackerKit",
    "PublicRegistries",
    "Publication",
    "Registry",
    "Resource",
    "SecurityGroupRequest",
    "TemplateShelf",
    "TemplateView",
    "Tool",
    "ToolExit",
    "ToolJob",
    "ToolLine",
    "Toolbox",
    "TransferKit",
]
