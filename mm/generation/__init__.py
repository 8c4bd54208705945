"""Text from a trained model: `generate` answers chats in batches, `stream` one chat as it is written."""

from mm.generation.engine import Generation, Stream, generate, generate_ids, stream
from mm.generation.sampling import Sampler

__all__ = ["Generation", "Sampler", "Stream", "generate", "generate_ids", "stream"]
