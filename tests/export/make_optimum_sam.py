"""Makes ``data/optimum_sam.zip``: a tiny SAM with random weights, and what ``optimum-cli`` exports of it.

optimum-onnx holds an older transformers than this project, so it wants an environment of its own::

    python3 -m venv optimum && optimum/bin/pip install torch==2.13.0
    optimum/bin/pip install optimum==2.1.0 optimum-onnx==0.1.0 onnx onnxruntime pillow
    optimum/bin/python tests/export/make_optimum_sam.py

The archive holds the export, and in ``checkpoint/`` what it was made from.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

SIZE, PATCH, WIDTH = 64, 16, 16
TARGET = Path(__file__).parent / "data" / "optimum_sam.zip"


def tiny_sam() -> SamModel:
    """A SAM with windows, global attention and weights of ordinary size: the defaults are near zero and hide faults."""
    sizes = {"image_size": SIZE, "patch_size": PATCH}
    config = SamConfig(
        vision_config={
            "hidden_size": WIDTH, "output_channels": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
            "mlp_dim": 2 * WIDTH, "window_size": 3, "global_attn_indexes": [1], "num_pos_feats": WIDTH // 2, **sizes,
        },
        prompt_encoder_config={"hidden_size": WIDTH, "mask_input_channels": 4, **sizes},
        mask_decoder_config={
            "hidden_size": WIDTH, "mlp_dim": 2 * WIDTH, "num_attention_heads": 2, "iou_head_hidden_dim": WIDTH,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    model = SamModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 or not parameter.any():
            inputs = parameter.shape[-1] if parameter.shape[0] == 1 else parameter[0].numel()
            torch.nn.init.normal_(parameter, std=max(inputs, 16) ** -0.5)
    return model


def main() -> None:
    """Write the archive."""
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, export = Path(scratch) / "checkpoint", Path(scratch) / "export"
        tiny_sam().save_pretrained(checkpoint)
        square = {"height": SIZE, "width": SIZE}
        SamProcessor(SamImageProcessor(size={"longest_edge": SIZE}, pad_size=square)).save_pretrained(checkpoint)
        program = Path(sys.executable).with_name("optimum-cli")
        task = ["--task", "feature-extraction"]
        subprocess.run([program, "export", "onnx", "--model", checkpoint, *task, export], check=True)
        TARGET.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(TARGET, "w") as archive:
            for file in [*sorted(export.iterdir()), *sorted(checkpoint.glob("*model*")), checkpoint / "config.json"]:
                name = file.name if file.parent == export else f"checkpoint/{file.name}"
                info = zipfile.ZipInfo(name)  # without a date: the same bytes each time
                info.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(info, file.read_bytes(), compresslevel=9)


if __name__ == "__main__":
    main()
