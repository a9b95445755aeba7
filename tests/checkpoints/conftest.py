"""Tiny models, and the state dicts of other codebases written out by their own names."""

import warnings

import pytest
import torch
from torch import nn

WIDTH, LAYERS, PATCH, OUTPUT, SIDE = 48, 2, 8, 32, 4
TEXT_WIDTH = 16


def block_shapes(width):
    return {
        "attn.in_proj_weight": (3 * width, width),
        "attn.in_proj_bias": (3 * width,),
        "attn.out_proj.weight": (width, width),
        "attn.out_proj.bias": (width,),
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "mlp.c_fc.weight": (4 * width, width),
        "mlp.c_fc.bias": (4 * width,),
        "mlp.c_proj.weight": (width, 4 * width),
        "mlp.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
    }


def vision_shapes(width=WIDTH, layers=LAYERS, patch=PATCH, output=OUTPUT, tokens=SIDE * SIDE):
    shapes = {
        "class_embedding": (width,),
        "positional_embedding": (1 + tokens, width),
        "proj": (width, output),
        "conv1.weight": (width, 3, patch, patch),
        "ln_pre.weight": (width,),
        "ln_pre.bias": (width,),
    }
    for layer in range(layers):
        shapes |= {f"transformer.resblocks.{layer}.{name}": shape for name, shape in block_shapes(width).items()}
    return shapes | {"ln_post.weight": (width,), "ln_post.bias": (width,)}


def clip_shapes(**size):
    """OpenAI CLIP: the text tower's own parameters first, then the image encoder, then the text tower's modules."""
    shapes = {"positional_embedding": (77, TEXT_WIDTH), "text_projection": (TEXT_WIDTH, OUTPUT), "logit_scale": ()}
    shapes |= {f"visual.{name}": shape for name, shape in vision_shapes(**size).items()}
    shapes |= {f"transformer.resblocks.0.{name}": shape for name, shape in block_shapes(TEXT_WIDTH).items()}
    return shapes | {
        "token_embedding.weight": (100, TEXT_WIDTH),
        "ln_final.weight": (TEXT_WIDTH,),
        "ln_final.bias": (TEXT_WIDTH,),
    }


def head_shapes(neck, classifier, dim, identities, neck_first):
    necks = {
        f"{neck}.weight": (dim,),
        f"{neck}.bias": (dim,),
        f"{neck}.running_mean": (dim,),
        f"{neck}.running_var": (dim,),
        f"{neck}.num_batches_tracked": (),
    }
    classifiers = {f"{classifier}.weight": (identities, dim)}
    return necks | classifiers if neck_first else classifiers | necks


def authors_shapes(tokens, joint=True, cameras=4, sim=True, alignment=True, identities=8):
    """The authors' Signal, names in the order of its modules."""
    shapes = {"clip_vision_encoder.cv_embed": (cameras, 1, WIDTH)} if cameras else {}
    shapes |= {f"clip_vision_encoder.base.{name}": shape for name, shape in vision_shapes(tokens=tokens).items()}
    if joint:
        shapes |= head_shapes("bottleneck", "classifier", 3 * OUTPUT, identities, True)
    else:
        for m in "rnt":
            shapes |= head_shapes(f"bottleneck_{m}", f"classifier_{m}", OUTPUT, identities, False)
    if sim:
        for part in "qkv":
            shapes[f"SIM.token_selection.W_{part}.weight"] = (OUTPUT, OUTPUT)
            shapes[f"SIM.token_selection.W_{part}.bias"] = (OUTPUT,)
        interaction = {
            "cross_attn.in_proj_weight": (3 * OUTPUT, OUTPUT),
            "cross_attn.in_proj_bias": (3 * OUTPUT,),
            "cross_attn.out_proj.weight": (OUTPUT, OUTPUT),
            "cross_attn.out_proj.bias": (OUTPUT,),
            "ffn.0.weight": (2 * OUTPUT, OUTPUT),
            "ffn.0.bias": (2 * OUTPUT,),
            "ffn.2.weight": (OUTPUT, 2 * OUTPUT),
            "ffn.2.bias": (OUTPUT,),
            "norm1.weight": (OUTPUT,),
            "norm1.bias": (OUTPUT,),
            "norm2.weight": (OUTPUT,),
            "norm2.bias": (OUTPUT,),
        }
        shapes |= {f"SIM.modal_interactive.{name}": shape for name, shape in interaction.items()}
        shapes |= head_shapes("bottleneck_var", "classifier_var", 3 * OUTPUT, identities, False)
    if alignment:
        shapes["AlignM.contra_temp"] = ()
        for m in "rnt":
            shapes[f"AlignM.DAS_{m}.conv_offset.0.weight"] = (OUTPUT, OUTPUT, 1, 1)
            shapes[f"AlignM.DAS_{m}.conv_offset.0.bias"] = (OUTPUT,)
            shapes[f"AlignM.DAS_{m}.conv_offset.2.weight"] = (OUTPUT, 1, 4, 4)
            shapes[f"AlignM.DAS_{m}.conv_offset.2.bias"] = (OUTPUT,)
            shapes[f"AlignM.DAS_{m}.conv_offset.4.weight"] = (1, OUTPUT, 1, 1)
            shapes[f"AlignM.DAS_{m}.proj_q.weight"] = (OUTPUT, OUTPUT, 1, 1)
            shapes[f"AlignM.DAS_{m}.proj_q.bias"] = (OUTPUT,)
    return shapes


def random_state(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.tensor(7) if name.endswith("num_batches_tracked") else torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def to_hugging_face(clip):
    """The same weights as `CLIPModel.state_dict()` names them."""
    vision = "vision_model."
    state = {
        "logit_scale": clip["logit_scale"],
        "text_projection.weight": clip["text_projection"].T.contiguous(),
        "visual_projection.weight": clip["visual.proj"].T.contiguous(),
        "text_model.embeddings.token_embedding.weight": clip["token_embedding.weight"],
        "text_model.final_layer_norm.weight": clip["ln_final.weight"],
        f"{vision}embeddings.class_embedding": clip["visual.class_embedding"],
        f"{vision}embeddings.patch_embedding.weight": clip["visual.conv1.weight"],
        f"{vision}embeddings.position_embedding.weight": clip["visual.positional_embedding"],
        f"{vision}embeddings.position_ids": torch.arange(1 + SIDE * SIDE)[None],
    }
    for kind in ("weight", "bias"):
        state[f"{vision}pre_layrnorm.{kind}"] = clip[f"visual.ln_pre.{kind}"]
        state[f"{vision}post_layernorm.{kind}"] = clip[f"visual.ln_post.{kind}"]
        for layer in range(LAYERS):
            ours, theirs = f"visual.transformer.resblocks.{layer}", f"{vision}encoder.layers.{layer}"
            query, key, value = clip[f"{ours}.attn.in_proj_{kind}"].chunk(3)
            state |= {
                f"{theirs}.self_attn.q_proj.{kind}": query.clone(),
                f"{theirs}.self_attn.k_proj.{kind}": key.clone(),
                f"{theirs}.self_attn.v_proj.{kind}": value.clone(),
                f"{theirs}.self_attn.out_proj.{kind}": clip[f"{ours}.attn.out_proj.{kind}"],
                f"{theirs}.layer_norm1.{kind}": clip[f"{ours}.ln_1.{kind}"],
                f"{theirs}.layer_norm2.{kind}": clip[f"{ours}.ln_2.{kind}"],
                f"{theirs}.mlp.fc1.{kind}": clip[f"{ours}.mlp.c_fc.{kind}"],
                f"{theirs}.mlp.fc2.{kind}": clip[f"{ours}.mlp.c_proj.{kind}"],
            }
    return state


class Container(nn.Module):
    """Carries parameters by name; scripted, it becomes an archive like OpenAI's."""

    def forward(self, x):
        return x


def scripted(state):
    root = Container()
    for name, value in state.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, Container())
            module = module._modules[part]
        module.register_parameter(last, nn.Parameter(value, requires_grad=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # OpenAI's files are what they are
        return torch.jit.script(root)


class Foreign:
    """Builds what other codebases save."""

    random_state = staticmethod(random_state)
    authors_shapes = staticmethod(authors_shapes)
    clip_shapes = staticmethod(clip_shapes)
    to_hugging_face = staticmethod(to_hugging_face)
    scripted = staticmethod(scripted)


@pytest.fixture(scope="session")
def foreign():
    return Foreign


@pytest.fixture(scope="session")
def clip_state():
    """A full CLIP of the tiny size in OpenAI's names, with values that fp16 holds exactly."""
    return {name: value.half().float() for name, value in random_state(clip_shapes()).items()}
