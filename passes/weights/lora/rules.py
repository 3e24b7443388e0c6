"""What other projects call the layers of diffusers' backbones: tables, a line for a layer.

A line has their name and ours; `{n}` is a number. Several of ours are rows of the one layer of theirs, in that order;
`.name` takes the place of the last part of the first of ours, `..name` of its last two. `~` before ours: the two halves
of the rows are the other way round there (shift and scale of a last norm); `~?`: where ours has two rows for each
column, as only a last norm's modulation has. A line counts for a model that has all of its layers, and of two lines
with one name of theirs the first that counts.
Sources: the releases' own code, and sd-scripts, musubi-tuner, ai-toolkit, x-flux and LyCORIS for the names that they
write into files.
"""

from __future__ import annotations

_FLUX = """
img_in x_embedder
txt_in context_embedder
time_in.in_layer time_text_embed.timestep_embedder.linear_1
time_in.out_layer time_text_embed.timestep_embedder.linear_2
vector_in.in_layer time_text_embed.text_embedder.linear_1
vector_in.out_layer time_text_embed.text_embedder.linear_2
guidance_in.in_layer time_text_embed.guidance_embedder.linear_1
guidance_in.out_layer time_text_embed.guidance_embedder.linear_2
final_layer.linear proj_out
final_layer.adaLN_modulation.1 ~norm_out.linear
double_blocks.{n}.img_attn.qkv transformer_blocks.{n}.attn.to_q .to_k .to_v
double_blocks.{n}.txt_attn.qkv transformer_blocks.{n}.attn.add_q_proj .add_k_proj .add_v_proj
double_blocks.{n}.img_attn.proj transformer_blocks.{n}.attn.to_out.0
double_blocks.{n}.txt_attn.proj transformer_blocks.{n}.attn.to_add_out
double_blocks.{n}.img_attn.norm.query_norm transformer_blocks.{n}.attn.norm_q
double_blocks.{n}.img_attn.norm.key_norm transformer_blocks.{n}.attn.norm_k
double_blocks.{n}.txt_attn.norm.query_norm transformer_blocks.{n}.attn.norm_added_q
double_blocks.{n}.txt_attn.norm.key_norm transformer_blocks.{n}.attn.norm_added_k
double_blocks.{n}.img_mlp.0 transformer_blocks.{n}.ff.net.0.proj
double_blocks.{n}.img_mlp.2 transformer_blocks.{n}.ff.net.2
double_blocks.{n}.txt_mlp.0 transformer_blocks.{n}.ff_context.net.0.proj
double_blocks.{n}.txt_mlp.2 transformer_blocks.{n}.ff_context.net.2
double_blocks.{n}.img_mod.lin transformer_blocks.{n}.norm1.linear
double_blocks.{n}.txt_mod.lin transformer_blocks.{n}.norm1_context.linear
single_blocks.{n}.linear1 single_transformer_blocks.{n}.attn.to_q .to_k .to_v ..proj_mlp
single_blocks.{n}.linear2 single_transformer_blocks.{n}.proj_out
single_blocks.{n}.norm.query_norm single_transformer_blocks.{n}.attn.norm_q
single_blocks.{n}.norm.key_norm single_transformer_blocks.{n}.attn.norm_k
single_blocks.{n}.modulation.lin single_transformer_blocks.{n}.norm.linear
"""
_XLABS = """
double_blocks.{n}.processor.qkv_lora1 transformer_blocks.{n}.attn.to_q .to_k .to_v
double_blocks.{n}.processor.qkv_lora2 transformer_blocks.{n}.attn.add_q_proj .add_k_proj .add_v_proj
double_blocks.{n}.processor.proj_lora1 transformer_blocks.{n}.attn.to_out.0
double_blocks.{n}.processor.proj_lora2 transformer_blocks.{n}.attn.to_add_out
single_blocks.{n}.processor.qkv_lora single_transformer_blocks.{n}.attn.to_q .to_k .to_v
single_blocks.{n}.processor.proj_lora single_transformer_blocks.{n}.proj_out
"""
_FLUX_2 = """
time_in.in_layer time_guidance_embed.timestep_embedder.linear_1
time_in.out_layer time_guidance_embed.timestep_embedder.linear_2
guidance_in.in_layer time_guidance_embed.guidance_embedder.linear_1
guidance_in.out_layer time_guidance_embed.guidance_embedder.linear_2
double_stream_modulation_img.lin double_stream_modulation_img.linear
double_stream_modulation_txt.lin double_stream_modulation_txt.linear
single_stream_modulation.lin single_stream_modulation.linear
double_blocks.{n}.img_mlp.0 transformer_blocks.{n}.ff.linear_in
double_blocks.{n}.img_mlp.2 transformer_blocks.{n}.ff.linear_out
double_blocks.{n}.txt_mlp.0 transformer_blocks.{n}.ff_context.linear_in
double_blocks.{n}.txt_mlp.2 transformer_blocks.{n}.ff_context.linear_out
single_blocks.{n}.linear1 single_transformer_blocks.{n}.attn.to_qkv_mlp_proj
single_blocks.{n}.linear2 single_transformer_blocks.{n}.attn.to_out
"""
_CHROMA = """
distilled_guidance_layer.in_proj distilled_guidance_layer.in_proj
distilled_guidance_layer.out_proj distilled_guidance_layer.out_proj
distilled_guidance_layer.layers.{n}.in_layer distilled_guidance_layer.layers.{n}.linear_1
distilled_guidance_layer.layers.{n}.out_layer distilled_guidance_layer.layers.{n}.linear_2
"""
_SD3 = """
x_embedder.proj pos_embed.proj
t_embedder.mlp.0 time_text_embed.timestep_embedder.linear_1
t_embedder.mlp.2 time_text_embed.timestep_embedder.linear_2
y_embedder.mlp.0 time_text_embed.text_embedder.linear_1
y_embedder.mlp.2 time_text_embed.text_embedder.linear_2
context_embedder context_embedder
joint_blocks.{n}.x_block.attn.qkv transformer_blocks.{n}.attn.to_q .to_k .to_v
joint_blocks.{n}.x_block.attn2.qkv transformer_blocks.{n}.attn2.to_q .to_k .to_v
joint_blocks.{n}.context_block.attn.qkv transformer_blocks.{n}.attn.add_q_proj .add_k_proj .add_v_proj
joint_blocks.{n}.x_block.attn.proj transformer_blocks.{n}.attn.to_out.0
joint_blocks.{n}.x_block.attn2.proj transformer_blocks.{n}.attn2.to_out.0
joint_blocks.{n}.context_block.attn.proj transformer_blocks.{n}.attn.to_add_out
joint_blocks.{n}.x_block.attn.ln_q transformer_blocks.{n}.attn.norm_q
joint_blocks.{n}.x_block.attn.ln_k transformer_blocks.{n}.attn.norm_k
joint_blocks.{n}.x_block.attn2.ln_q transformer_blocks.{n}.attn2.norm_q
joint_blocks.{n}.x_block.attn2.ln_k transformer_blocks.{n}.attn2.norm_k
joint_blocks.{n}.context_block.attn.ln_q transformer_blocks.{n}.attn.norm_added_q
joint_blocks.{n}.context_block.attn.ln_k transformer_blocks.{n}.attn.norm_added_k
joint_blocks.{n}.x_block.mlp.fc1 transformer_blocks.{n}.ff.net.0.proj
joint_blocks.{n}.x_block.mlp.fc2 transformer_blocks.{n}.ff.net.2
joint_blocks.{n}.context_block.mlp.fc1 transformer_blocks.{n}.ff_context.net.0.proj
joint_blocks.{n}.context_block.mlp.fc2 transformer_blocks.{n}.ff_context.net.2
joint_blocks.{n}.x_block.adaLN_modulation.1 transformer_blocks.{n}.norm1.linear
joint_blocks.{n}.context_block.adaLN_modulation.1 ~?transformer_blocks.{n}.norm1_context.linear
"""
_AURAFLOW = """
t_embedder.mlp.0 time_step_proj.linear_1
t_embedder.mlp.2 time_step_proj.linear_2
cond_seq_linear context_embedder
init_x_linear pos_embed.proj
final_linear proj_out
modF.1 ~norm_out.linear
double_layers.{n}.mlpX.c_fc1 joint_transformer_blocks.{n}.ff.linear_1
double_layers.{n}.mlpX.c_fc2 joint_transformer_blocks.{n}.ff.linear_2
double_layers.{n}.mlpX.c_proj joint_transformer_blocks.{n}.ff.out_projection
double_layers.{n}.mlpC.c_fc1 joint_transformer_blocks.{n}.ff_context.linear_1
double_layers.{n}.mlpC.c_fc2 joint_transformer_blocks.{n}.ff_context.linear_2
double_layers.{n}.mlpC.c_proj joint_transformer_blocks.{n}.ff_context.out_projection
double_layers.{n}.modX.1 joint_transformer_blocks.{n}.norm1.linear
double_layers.{n}.modC.1 joint_transformer_blocks.{n}.norm1_context.linear
double_layers.{n}.attn.w2q joint_transformer_blocks.{n}.attn.to_q
double_layers.{n}.attn.w2k joint_transformer_blocks.{n}.attn.to_k
double_layers.{n}.attn.w2v joint_transformer_blocks.{n}.attn.to_v
double_layers.{n}.attn.w2o joint_transformer_blocks.{n}.attn.to_out.0
double_layers.{n}.attn.w1q joint_transformer_blocks.{n}.attn.add_q_proj
double_layers.{n}.attn.w1k joint_transformer_blocks.{n}.attn.add_k_proj
double_layers.{n}.attn.w1v joint_transformer_blocks.{n}.attn.add_v_proj
double_layers.{n}.attn.w1o joint_transformer_blocks.{n}.attn.to_add_out
single_layers.{n}.mlp.c_fc1 single_transformer_blocks.{n}.ff.linear_1
single_layers.{n}.mlp.c_fc2 single_transformer_blocks.{n}.ff.linear_2
single_layers.{n}.mlp.c_proj single_transformer_blocks.{n}.ff.out_projection
single_layers.{n}.modCX.1 single_transformer_blocks.{n}.norm1.linear
single_layers.{n}.attn.w1q single_transformer_blocks.{n}.attn.to_q
single_layers.{n}.attn.w1k single_transformer_blocks.{n}.attn.to_k
single_layers.{n}.attn.w1v single_transformer_blocks.{n}.attn.to_v
single_layers.{n}.attn.w1o single_transformer_blocks.{n}.attn.to_out.0
"""
_WAN = """
time_embedding.0 condition_embedder.time_embedder.linear_1
time_embedding.2 condition_embedder.time_embedder.linear_2
text_embedding.0 condition_embedder.text_embedder.linear_1
text_embedding.2 condition_embedder.text_embedder.linear_2
time_projection.1 condition_embedder.time_proj
img_emb.proj.0 condition_embedder.image_embedder.norm1
img_emb.proj.1 condition_embedder.image_embedder.ff.net.0.proj
img_emb.proj.3 condition_embedder.image_embedder.ff.net.2
img_emb.proj.4 condition_embedder.image_embedder.norm2
head.head proj_out
blocks.{n}.self_attn.q blocks.{n}.attn1.to_q
blocks.{n}.self_attn.k blocks.{n}.attn1.to_k
blocks.{n}.self_attn.v blocks.{n}.attn1.to_v
blocks.{n}.self_attn.o blocks.{n}.attn1.to_out.0
blocks.{n}.self_attn.norm_q blocks.{n}.attn1.norm_q
blocks.{n}.self_attn.norm_k blocks.{n}.attn1.norm_k
blocks.{n}.cross_attn.q blocks.{n}.attn2.to_q
blocks.{n}.cross_attn.k blocks.{n}.attn2.to_k
blocks.{n}.cross_attn.v blocks.{n}.attn2.to_v
blocks.{n}.cross_attn.o blocks.{n}.attn2.to_out.0
blocks.{n}.cross_attn.k_img blocks.{n}.attn2.add_k_proj
blocks.{n}.cross_attn.v_img blocks.{n}.attn2.add_v_proj
blocks.{n}.cross_attn.norm_q blocks.{n}.attn2.norm_q
blocks.{n}.cross_attn.norm_k blocks.{n}.attn2.norm_k
blocks.{n}.cross_attn.norm_k_img blocks.{n}.attn2.norm_added_k
blocks.{n}.ffn.0 blocks.{n}.ffn.net.0.proj
blocks.{n}.ffn.2 blocks.{n}.ffn.net.2
"""
_WAN_NORMS = """
blocks.{n}.norm3 blocks.{n}.norm2
"""
_Z_IMAGE = """
layers.{n}.attention.qkv layers.{n}.attention.to_q .to_k .to_v
layers.{n}.attention.out layers.{n}.attention.to_out.0
layers.{n}.attention.q_norm layers.{n}.attention.norm_q
layers.{n}.attention.k_norm layers.{n}.attention.norm_k
noise_refiner.{n}.attention.qkv noise_refiner.{n}.attention.to_q .to_k .to_v
noise_refiner.{n}.attention.out noise_refiner.{n}.attention.to_out.0
context_refiner.{n}.attention.qkv context_refiner.{n}.attention.to_q .to_k .to_v
context_refiner.{n}.attention.out context_refiner.{n}.attention.to_out.0
x_embedder all_x_embedder.2-1
final_layer.linear all_final_layer.2-1.linear
final_layer.adaLN_modulation.1 all_final_layer.2-1.adaLN_modulation.1
"""
_HUNYUAN_VIDEO = """
img_in.proj x_embedder.proj
time_in.mlp.0 time_text_embed.timestep_embedder.linear_1
time_in.mlp.2 time_text_embed.timestep_embedder.linear_2
guidance_in.mlp.0 time_text_embed.guidance_embedder.linear_1
guidance_in.mlp.2 time_text_embed.guidance_embedder.linear_2
double_blocks.{n}.img_attn_qkv transformer_blocks.{n}.attn.to_q .to_k .to_v
double_blocks.{n}.txt_attn_qkv transformer_blocks.{n}.attn.add_q_proj .add_k_proj .add_v_proj
double_blocks.{n}.img_attn_proj transformer_blocks.{n}.attn.to_out.0
double_blocks.{n}.txt_attn_proj transformer_blocks.{n}.attn.to_add_out
double_blocks.{n}.img_mlp.fc1 transformer_blocks.{n}.ff.net.0.proj
double_blocks.{n}.img_mlp.fc2 transformer_blocks.{n}.ff.net.2
double_blocks.{n}.txt_mlp.fc1 transformer_blocks.{n}.ff_context.net.0.proj
double_blocks.{n}.txt_mlp.fc2 transformer_blocks.{n}.ff_context.net.2
double_blocks.{n}.img_mod.linear transformer_blocks.{n}.norm1.linear
double_blocks.{n}.txt_mod.linear transformer_blocks.{n}.norm1_context.linear
single_blocks.{n}.modulation.linear single_transformer_blocks.{n}.norm.linear
txt_in.input_embedder context_embedder.proj_in
txt_in.t_embedder.mlp.0 context_embedder.time_text_embed.timestep_embedder.linear_1
txt_in.t_embedder.mlp.2 context_embedder.time_text_embed.timestep_embedder.linear_2
txt_in.c_embedder.linear_1 context_embedder.time_text_embed.text_embedder.linear_1
txt_in.c_embedder.linear_2 context_embedder.time_text_embed.text_embedder.linear_2
REFINER.self_attn_qkv OURS.attn.to_q .to_k .to_v
REFINER.self_attn_proj OURS.attn.to_out.0
REFINER.mlp.fc1 OURS.ff.net.0.proj
REFINER.mlp.fc2 OURS.ff.net.2
REFINER.adaLN_modulation.1 OURS.norm_out.linear
""".replace("REFINER", "txt_in.individual_token_refiner.blocks.{n}").replace(
    "OURS", "context_embedder.token_refiner.refiner_blocks.{n}"
)
_MOCHI = """
blocks.{n}.attn.qkv_x transformer_blocks.{n}.attn1.to_q .to_k .to_v
blocks.{n}.attn.qkv_y transformer_blocks.{n}.attn1.add_q_proj .add_k_proj .add_v_proj
blocks.{n}.attn.proj_x transformer_blocks.{n}.attn1.to_out.0
blocks.{n}.attn.proj_y transformer_blocks.{n}.attn1.to_add_out
blocks.{n}.mod_x transformer_blocks.{n}.norm1.linear
blocks.{n}.mod_y transformer_blocks.{n}.norm1_context.linear
blocks.{n}.mlp_x.w1 ~transformer_blocks.{n}.ff.net.0.proj
blocks.{n}.mlp_x.w2 transformer_blocks.{n}.ff.net.2
blocks.{n}.mlp_y.w1 ~transformer_blocks.{n}.ff_context.net.0.proj
blocks.{n}.mlp_y.w2 transformer_blocks.{n}.ff_context.net.2
"""
_LUMINA_2 = """
cap_embedder.0 time_caption_embed.caption_embedder.0
cap_embedder.1 time_caption_embed.caption_embedder.1
t_embedder.mlp.0 time_caption_embed.timestep_embedder.linear_1
t_embedder.mlp.2 time_caption_embed.timestep_embedder.linear_2
layers.{n}.attention.qkv layers.{n}.attn.to_q .to_k .to_v
layers.{n}.attention.out layers.{n}.attn.to_out.0
layers.{n}.feed_forward.w1 layers.{n}.feed_forward.linear_1
layers.{n}.feed_forward.w2 layers.{n}.feed_forward.linear_2
layers.{n}.feed_forward.w3 layers.{n}.feed_forward.linear_3
layers.{n}.adaLN_modulation.1 layers.{n}.norm1.linear
"""
_UNET = """
time_embed.0 time_embedding.linear_1
time_embed.2 time_embedding.linear_2
label_emb.0.0 add_embedding.linear_1
label_emb.0.2 add_embedding.linear_2
input_blocks.0.0 conv_in
out.0 conv_norm_out
out.2 conv_out
"""


def _rows(*tables: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    lines = (line.split() for table in tables for line in table.strip().splitlines())
    return tuple((theirs, tuple(_full(ours[0], name) for name in ours)) for theirs, *ours in lines)


def _full(first: str, name: str) -> str:
    dots = len(name) - len(name.lstrip("."))
    return ".".join((*first.split(".")[:-dots], name[dots:])) if dots else name


TABLES = {
    "flux": _rows(_FLUX),
    "xlabs": _rows(_XLABS),
    "flux2": _rows(_FLUX_2),
    "chroma": _rows(_CHROMA),
    "sd3": _rows(_SD3),
    "auraflow": _rows(_AURAFLOW),
    "wan": _rows(_WAN),
    "z-image": _rows(_Z_IMAGE),
    "hunyuan-video": _rows(_HUNYUAN_VIDEO),
    "mochi": _rows(_MOCHI),
    "lumina2": _rows(_LUMINA_2),
    "unet": _rows(_UNET),
}
"""Name of a table -> its lines, (their name, our names): see the top of this file."""
LAYERS = tuple(line for table in TABLES.values() for line in table)
"""The lines of all tables."""
OVERRIDES = _rows(_WAN_NORMS)
"""The same for names that also are a layer of ours, and another one: they count where `WORDS` find a file of theirs."""
WORDS = ("self_attn", "cross_attn")
"""What stands in the names of files to which OVERRIDES apply."""

SPELLINGS: tuple[tuple[tuple[str, str], ...], ...] = (
    (
        ("proj_in", "patchify_proj"),
        ("time_embed.", "adaln_single."),
        ("norm_q", "q_norm"),
        ("norm_k", "k_norm"),
    ),
    ((r".to_out.0", ".to_out"),),
    (("attn.to_qkv_mlp_proj", "attn.to_qkv_mlp"),),
)
"""Sets of (ours, theirs): parts of names that a project spells another way throughout (LTX-Video; early PEFT files)."""
