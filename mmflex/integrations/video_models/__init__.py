"""The video models of MMInference's paper that run in their authors' own code: the layouts of their prompts.

Each by its formula (``..._layout``), from frames, grid, pooling, newlines and text lengths, with an error unless they
add up to the prompt; and read while the model runs (``read_...``), for `mmflex.intercept`::

    with mmflex.intercept(model, spec, layout=read_llava_video(model)):
        model.generate(ids, images=[frames], modalities=["video"])
"""

from .llava_video import llava_video_layout, read_llava_video
from .longvila import longvila_layout, read_longvila
from .pieces import Image, Video
from .videochat_flash import read_videochat_flash, videochat_flash_layout

__all__ = [
    "Image",
    "Video",
    "llava_video_layout",
    "longvila_layout",
    "read_llava_video",
    "read_longvila",
    "read_videochat_flash",
    "videochat_flash_layout",
]
