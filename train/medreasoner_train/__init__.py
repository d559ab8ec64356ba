"""The bundled PyTorch module that trains MedReasoner's reasoner and segmenter.

Nothing here is imported by the runtime; see ``medreasoner-cli train --help`` for the road from data to checkpoint.
"""
