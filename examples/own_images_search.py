"""Finds, for a query without labels, the most similar of one's own images: model, index, search, threshold.

Usage: python examples/own_images_search.py [DIRECTORY]

The weights are random here, so the answer means nothing; yours are `best.safetensors` of a training.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import signal_reid
from signal_reid.data.synthetic import synthesize

directory = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
sizes = {"train_identities": 2, "test_identities": 4, "images_per_identity": 3, "image_size": (64, 64)}
root = synthesize("rgbnt201", directory / "data", **sizes)
config = signal_reid.load_config("demo", [f"data.root={root}"])
model = signal_reid.build_model(config, num_identities=2, num_cameras=2)
signal_reid.checkpoints.export(model, directory / "weights.safetensors", config=config)

gallery = directory / "gallery"  # RGB and thermal images; no near-infrared, no labels
for modality in ("RGB", "TI"):
    shutil.copytree(root / "test" / modality, gallery / modality)
query = {modality: min((gallery / modality).iterdir()) for modality in ("RGB", "TI")}

retriever = signal_reid.Retriever(directory / "weights.safetensors")
retriever.build(directory / "gallery.index", gallery)
for hit in retriever.search(query, top=3):
    print(hit.rank, f"{hit.score:.4f}", hit.name)
print("by thermal alone:", retriever.search({"TI": query["TI"]}, top=1)[0].name)
