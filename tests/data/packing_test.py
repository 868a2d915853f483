"""Packed rows against each example alone: logits and gradients of all families; plans, rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import oracle, tiny
from PIL import Image

from caprl_jax import sharding
from caprl_jax.data.bad_rows import BadRowList
from caprl_jax.data.chat_rendering import ChatRenderer
from caprl_jax.data.image_check import ImageCheck
from caprl_jax.data.image_prompts import build_prompt, stack_prompts
from caprl_jax.data.packing import PackConfig, Packer, first_fit, packed_batches
from caprl_jax.data.readers.conversations import Asking, Conversation, Turn, read_examples
from caprl_jax.data.rows import read_image
from caprl_jax.hub.load import load_policy
from caprl_jax.models.decoder import head_matrix
from caprl_jax.models.image_processor import pad_image
from caprl_jax.supervised.next_token import packed_loss
from caprl_jax.types import Images, Prompts

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "internvl-qwen2-tied")
ROWS = ((0, None, 2), (None,))  # pictures of `oracle.pictures()`, None for text alone


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
  return oracle.make_pair(request.param)


def examples(cfg):
  """(patches or None, prompt) of each example, row by row."""
  mrope = cfg.text.mrope_sections is not None
  rng = np.random.default_rng(0)

  def one(picture):
    words = rng.integers(5, 100, rng.integers(5, 9)).tolist()
    if picture is None:
      return None, build_prompt(words, (0, 0), [], cfg.image_token, False)
    patches = cfg.vision.pixels.patchify(oracle.pictures()[picture])
    return patches, build_prompt(words[:3], patches.grid_units, words[3:], cfg.image_token, mrope)

  return [[one(picture) for picture in row] for row in ROWS]


def packed(cfg, rows, images=3, extra=4):
  """Arrays of rows packed by hand; one padded image a row, in another place in each, and padded
  tokens.
  """
  slots = max(len(p.valid_S) for row in rows for p, _ in row if p)
  units = slots // cfg.vision.pixels.merge_size**2
  length = max(sum(len(p.tokens) for _, p in row) for row in rows) + extra
  empty = pad_image(next(p for p, _ in rows[0] if p), slots, 200)
  empty = {k: np.zeros_like(v) for k, v in empty.items()}
  fields, made = [], []
  for row in rows:
    tokens, position = np.zeros(length, np.int32), np.zeros((3, length), np.int32)
    segment, at, shown, unit = np.zeros(length, np.int32), 0, [], []
    for number, (patches, prompt) in enumerate(row, 1):
      span = slice(at, at + len(prompt.tokens))
      tokens[span], position[:, span], segment[span] = prompt.tokens, prompt.position, number
      at = span.stop
      if patches:
        unit.append(patches.unit_I + len(shown) * units)
        shown.append(pad_image(patches, slots, 200))
    unit = np.concatenate([*unit, np.zeros(0, np.int32)])
    fields += shown + [empty] * (images - len(shown))
    made.append((tokens, segment > 0, position, segment, np.pad(unit, (0, length - len(unit)))))
  tokens, valid, position, segment, unit = map(np.stack, zip(*made))
  stacked = {k: np.stack([f[k] for f in fields]) for k in fields[0]}
  prompts = Prompts(tokens, valid, position, np.zeros(len(rows), np.int32))
  return Images(**{**stacked, "unit_BI": unit}), prompts, segment


def logits(pair, hidden, params):
  return hidden @ head_matrix(pair.cfg.text, params["language_model"]).T


def loss(logits, tokens, own):
  """Of next tokens, where `own` says that they belong to the token before."""
  logp = jnp.take_along_axis(jax.nn.log_softmax(logits[..., :-1, :]), tokens[..., 1:, None], -1)
  return -jnp.where(own, logp[..., 0], 0).sum()


@pytest.fixture(scope="module")
def apart(pair):
  """(logits [L, V], gradients) of each example by itself, through `prefill`, row by row."""
  rows = examples(pair.cfg)
  shown = [patches for row in rows for patches, _ in row if patches]
  slots, tokens = (max(sizes) for sizes in zip(*((len(p.valid_S), p.num_tokens) for p in shown)))
  length = max(len(prompt.tokens) for row in rows for _, prompt in row)

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def run(params, images, prompts):
    variables = {"params": params}
    if images is None:
      given = (prompts.tokens_BP, prompts.position_B3P[:, 0], prompts.valid_BP, ())
      hidden = pair.ours.apply(variables, *given, method="extend")[0]
    else:
      hidden = pair.ours.apply(variables, images, prompts, method="prefill")[0]
    out = logits(pair, hidden, params)
    return loss(out, prompts.tokens_BP, prompts.valid_BP[:, 1:]), out[0]

  def one(patches, prompt):
    padded = pad_image(patches, slots, tokens) if patches else {}
    images = Images(**{k: v[None] for k, v in padded.items()}) if patches else None
    grads, out = run(pair.params, images, stack_prompts([prompt], length))
    return out[: len(prompt.tokens)], grads

  return [[one(*example) for example in row] for row in rows]


@pytest.fixture(scope="module")
def together(pair):
  """(logits [B, L, V], gradients, segments) of the packed rows."""
  images, prompts, segment = packed(pair.cfg, examples(pair.cfg))

  @jax.jit
  @functools.partial(jax.grad, has_aux=True)
  def run(params):
    hidden = pair.ours.apply({"params": params}, images, prompts, segment, method="packed")
    out = logits(pair, hidden, params)
    own = (segment[:, 1:] == segment[:, :-1]) & (segment[:, 1:] > 0)
    return loss(out, prompts.tokens_BP, own), out

  grads, out = run(pair.params)
  return out, grads, segment


def test_packed_logits_are_each_example_s_own(together, apart):
  got, _, segment = together
  for b, row in enumerate(apart):
    for number, (want, _) in enumerate(row, 1):
      assert oracle.relative_error(got[b][segment[b] == number], want) < 1e-5, (b, number)


def test_packed_gradients_are_the_sum_of_the_examples_own(together, apart):
  each = [grads for row in apart for _, grads in row]
  want = jax.tree.map(lambda *x: sum(map(np.asarray, x)), *each)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(together[1]), jax.tree.leaves(want), strict=True
  ):
    if np.abs(b).max() < 1e-4:  # a key's bias moves all scores alike
      assert np.abs(a).max() < 1e-3, jax.tree_util.keystr(path)
    else:
      assert oracle.relative_error(a, b) < 2e-4, jax.tree_util.keystr(path)


def test_text_alone_needs_no_tower(pair):
  tokens = np.arange(10).reshape(2, 5)
  prompts = Prompts(
    tokens,
    np.ones_like(tokens, bool),
    np.broadcast_to(np.arange(5), (2, 3, 5)),
    np.zeros(2, np.int32),
  )
  got = pair.ours.apply(
    {"params": pair.params}, None, prompts, np.ones_like(tokens), method="packed"
  )
  want = pair.ours.apply(
    {"params": pair.params},
    tokens,
    np.broadcast_to(np.arange(5), (2, 5)),
    prompts.valid_BP,
    (),
    method="extend",
  )[0]
  np.testing.assert_array_equal(got, want)


# ---- the plan and its rows ----


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("packing")
  tiny.write_policy(folder / "policy")
  tiny.write_data(folder / "data")
  return folder


@pytest.fixture(scope="module")
def policy(tiny_folder):
  return load_policy(
    str(tiny_folder / "policy"), sharding.make_mesh(sharding.MeshConfig(), jax.devices()[:1])
  )


def talks(folder):
  """Questions with images, and conversations without, of several lengths."""
  text = lambda n: Conversation(
    None, (Turn("user", "what " * n), Turn("assistant", "A red circle.")), f"text {n}"
  )
  return read_examples(str(folder / "data" / "rows.jsonl"), "", Asking(questions=1)) + [
    text(n) for n in (1, 9, 20, 2, 90)
  ]


def make_packer(policy, examples, seed=3, found=(), **settings):
  template, special = policy.chat_template()
  return Packer(
    examples,
    ChatRenderer(template, policy.model.cfg.family, policy.tokenizer, special),
    policy.model.cfg,
    PackConfig(**settings),
    seed,
    *found,
  )


def test_first_fit_leaves_little_empty_and_keeps_both_limits():
  rng = np.random.default_rng(0)
  lengths, images = rng.integers(20, 1500, 2000), rng.integers(0, 2, 2000)
  rows = first_fit(lengths, images, 2048, 4)
  assert sorted(i for row in rows for i in row) == list(range(2000))
  assert all(lengths[row].sum() <= 2048 and images[row].sum() <= 4 for row in rows)
  assert lengths.sum() / (2048 * len(rows)) > 0.97
  assert max(images[row].sum() for row in first_fit(lengths, images, 2048, 1)) == 1
  assert first_fit([5, 5, 5], [0, 0, 0], 10, 1) == [[0, 1], [2]]


def test_a_plan_holds_every_example_once_and_depends_on_seed_and_epoch_alone(tiny_folder, policy):
  examples = talks(tiny_folder)
  packer = make_packer(policy, examples, tokens=256, window=16)
  for epoch in (0, 1, 5):
    plan = packer.plan(epoch)
    assert sorted(i for row in plan.rows for i in row) == list(range(len(examples)))
    for row in plan.rows:
      assert sum(len(plan.rendered[i].tokens_L) + packer.counts[i] for i in row) <= 256
      assert sum(packer.counts[i] > 0 for i in row) <= packer.images
  again = make_packer(policy, examples, tokens=256, window=16)
  other = make_packer(policy, examples, seed=4, tokens=256, window=16)
  rows = lambda p, epoch: p.plan(epoch).rows
  assert (
    rows(again, 5) == rows(packer, 5)
    and rows(packer, 5) != rows(packer, 1)
    and rows(other, 1) != rows(packer, 1)
  )
  texts = lambda epoch: [r.tokens_L.tolist() for r in packer.plan(epoch).rendered]
  questions = len(examples) - 5
  changed = [a != b for a, b in zip(texts(0), texts(1))]
  # Options come in another order; text stays as it is.
  assert sum(changed[:questions]) > questions / 4 and not any(changed[questions:])
  first = len(rows(packer, 0))
  assert [packer.locate(n) for n in (0, first - 1, first)] == [(0, 0), (0, first - 1), (1, 0)]
  assert packer.rows_until(1) == first and packer.rows_until(1.5) == first + round(
    len(rows(packer, 1)) / 2
  )
  figures = packer.figures()
  assert figures["fill"] == packer.plan(0).tokens / (first * 256) > 0.8 and figures[
    "examples"
  ] == len(examples)


def test_threads_that_reach_the_next_epoch_together_agree_where_it_begins(tiny_folder, policy):
  packer = make_packer(policy, talks(tiny_folder), tokens=256, window=4)
  sizes = [len(packer.plan(epoch).rows) for epoch in range(8)]
  # or a start that is counted with another epoch's rows would be right by chance
  assert len(set(sizes)) > 1
  plan, reached = packer.plan, set()

  def while_another_thread_goes_on(epoch):
    made = plan(epoch)
    if epoch not in reached:
      reached.add(epoch)
      packer.locate(sum(sizes[: epoch + 1]) - 1)
    return made

  packer.plan = while_another_thread_goes_on
  packer.locate(sum(sizes) - 1)
  assert packer.starts == [sum(sizes[:epoch]) for epoch in range(9)]


def test_rows_hold_their_examples(tiny_folder, policy):
  """Row by row: tokens, positions, segments, wanted tokens, and the units of the right image."""
  packer = make_packer(policy, talks(tiny_folder), tokens=256, images=4)
  plan, cfg = packer.plan(0), policy.model.cfg
  units = packer.shape.slots // 4
  for number, members in enumerate(plan.rows):
    row, shown = packer(number), 0
    assert row.segment_BL.max() == len(members) and row.images.patches_BSE.shape[0] == 4
    is_image = (row.prompts.tokens_BP == cfg.image_token) & row.prompts.valid_BP
    for place, index in enumerate(members, 1):
      own = row.segment_BL == place
      tokens, rendered = row.prompts.tokens_BP[own], plan.rendered[index]
      assert tokens[tokens != cfg.image_token].tolist() == rendered.tokens_L.tolist()
      assert (
        row.prompts.tokens_BP[own & row.wanted_BL].tolist()
        == rendered.tokens_L[rendered.wanted_L].tolist()
      )
      assert row.prompts.position_B3P[:, own][:, 0].tolist() == [0, 0, 0]
      if packer.counts[index]:
        patches = cfg.vision.pixels.patchify(read_image(packer.examples[index]))
        np.testing.assert_array_equal(
          row.images.patches_BSE[shown][: len(patches.valid_S)], patches.patches_SE
        )
        at = np.cumsum(is_image)[own & is_image] - 1
        np.testing.assert_array_equal(row.images.unit_BI[at], patches.unit_I + shown * units)
        shown += 1
    assert (
      not row.images.valid_BS[shown:].any()
      and (row.segment_BL == 0).sum() == (~row.prompts.valid_BP).sum()
    )


def test_too_long_is_refused_or_dropped_and_never_cut(tiny_folder, policy, caplog):
  examples = talks(tiny_folder)
  with pytest.raises(
    ValueError,
    match=r"1 of 29 examples are longer than a row's 100 tokens \(the longest, 'text 90'",
  ):
    make_packer(policy, examples, tokens=100)
  packer = make_packer(policy, examples, tokens=100, too_long="drop")
  assert len(packer.examples) == 28 and "dropped 1 of 29 examples are longer" in caplog.text
  with pytest.raises(ValueError, match="no example is left"):
    make_packer(policy, examples, tokens=10, too_long="drop")
  one = make_packer(policy, examples, tokens=256, packing=False)
  assert len(one.plan(0).rows) == 29 and one.images == 1
  assert make_packer(policy, examples[-5:], tokens=256)(0).images is None


def test_images_that_cannot_be_read(tiny_folder, policy, caplog):
  broken = tiny_folder / "broken.png"
  broken.write_bytes(b"no image")
  bad = Conversation(broken, (Turn("user", "what", 0), Turn("assistant", "it")), "bad one")
  with pytest.raises(ValueError, match="row 'bad one': cannot read its image"):
    make_packer(policy, [bad, *talks(tiny_folder)], tokens=256)
  assert (
    len(make_packer(policy, [bad, *talks(tiny_folder)], tokens=256, bad_rows="drop").examples) == 29
  )
  assert (
    "dropped: row 'bad one': cannot read its image" in caplog.text
    and "dropped 1 bad rows of 30" in caplog.text
  )
  narrow = tiny_folder / "narrow.png"
  Image.new("RGB", (4, 900)).save(narrow)
  with pytest.raises(
    ValueError, match=r"row 'narrow one' \(.*narrow.png\): .*one side is over 200 times the other"
  ):
    make_packer(policy, [dataclasses.replace(bad, image=narrow, name="narrow one")], tokens=256)


@pytest.mark.parametrize("packing", [True, False])
def test_images_whose_pixels_are_cut(tiny_folder, policy, caplog, packing):
  """Their headers are fine: what is wrong shows when a row is made."""
  whole, cut = tiny_folder / "whole.jpg", tiny_folder / "cut.jpg"
  Image.effect_noise((48, 48), 90).convert("RGB").save(whole)
  cut.write_bytes(whole.read_bytes()[:-900])
  talk = lambda image, name: Conversation(
    image, (Turn("user", "what", 0), Turn("assistant", "it is red")), name
  )
  examples = [*talks(tiny_folder)[-5:], talk(cut, "cut one"), talk(whole, "whole one")]
  settings = dict(tokens=128, images=2, packing=packing)
  refusing = make_packer(policy, examples, **settings)
  with pytest.raises(
    ValueError,
    match=r"row 'cut one': cannot read its image \(.*cut.jpg\).*drop the row \(bad_rows = "
    "'drop' leaves it out",
  ) as raised:
    list(packed_batches(refusing, 1, len(refusing.plan(0).rows)))
  assert str(raised.value).count("'cut one'") == 1

  packer = make_packer(policy, examples, bad_rows="drop", **settings)
  batches = list(packed_batches(packer, 1, packer.rows_until(2), threads=2))
  assert sum(int(batch.dropped_B.sum()) for batch in batches) == 2  # once an epoch
  assert sum(int(batch.segment_BL.max()) for batch in batches) == 2 * (len(examples) - 1)
  assert caplog.text.count("dropped: row 'cut one': cannot read its image") == 1
  # What is left is as it would be without it.
  loss = jax.jit(lambda batch: packed_loss(policy.model, policy.params, batch, 64))
  total = [
    sum(float(x) for x in column) for column in zip(*map(loss, batches[: packer.rows_until(1)]))
  ]
  without = make_packer(policy, [e for e in examples if e.name != "cut one"], **settings)
  want = [
    loss(jax.tree.map(lambda x: np.asarray(x)[None], without(n)))
    for n in range(without.rows_until(1))
  ]
  np.testing.assert_allclose(
    total, [sum(float(x) for x in column) for column in zip(*want)], rtol=1e-5
  )


def test_batches_resume_and_do_not_depend_on_processes(tiny_folder, policy):
  examples = talks(tiny_folder)
  make = lambda share=None: packed_batches(
    make_packer(policy, examples, tokens=128), 4, 6, share, threads=2
  )
  same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
  iterator = make()
  batches, states = [], []
  for batch in iterator:
    batches.append(batch)
    states.append(iterator.get_state())
  assert len(batches) == 6 and batches[0].segment_BL.shape == (4, 128)
  resumed = make()
  resumed.set_state(states[3])
  same(next(resumed), batches[4])
  for part in ([0, 1], [3]):
    same(next(make(part)), jax.tree.map(lambda x: x[np.array(part)], batches[0]))


def test_the_loss_of_packed_rows_is_that_of_the_examples(tiny_folder, policy):
  examples = talks(tiny_folder)
  loss = jax.jit(lambda batch: packed_loss(policy.model, policy.params, batch, 64))
  sums = []
  for settings in (dict(tokens=256), dict(tokens=160, packing=False)):
    packer = make_packer(policy, examples, **settings)
    rows = [packer(n) for n in range(packer.rows_until(1))]
    made = [loss(jax.tree.map(lambda *x: np.stack(x), *rows))]
    sums.append([sum(float(x) for x in column) for column in zip(*made)])
  assert sums[0][1] == sums[1][1] > 50
  np.testing.assert_allclose(sums[0][0], sums[1][0], rtol=1e-5)


def test_images_are_decoded_before_the_first_row(tiny_folder, policy, tmp_path, caplog):
  """With what a pass found, cut pixels, thin images and long texts are noted when a packer is
  made; what goes later becomes padding."""
  Image.effect_noise((48, 48), 90).convert("RGB").save(tmp_path / "whole.jpg")
  (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-900])
  Image.new("RGB", (4, 900)).save(tmp_path / "thin.png")
  talk = lambda name, say="it is red": Conversation(
    tmp_path / name, (Turn("user", "what", 0), Turn("assistant", say)), name, where=f"talks:{name}"
  )
  bad = [talk("cut.jpg"), talk("thin.png"), talk("whole.jpg", "it is red " * 99)]
  examples = [*bad, *talks(tiny_folder), talk("whole.jpg")]
  rule = BadRowList("drop", tmp_path / "bad_rows.jsonl")

  def make(rule, **more):
    rule.keep(examples)
    found = (ImageCheck(tmp_path / "work"), rule)
    return make_packer(policy, examples, 0, found, tokens=128, bad_rows=rule.rule, **more)

  packer = make(rule)
  assert packer.examples == [*talks(tiny_folder), examples[-1]]
  assert [(row.where, row.reason) for row in rule.rows] == [
    ("talks:cut.jpg", "damaged image"),
    ("talks:thin.png", "too narrow"),
    ("talks:whole.jpg", "too long"),
  ]
  with pytest.raises(ValueError, match="longer than a row's 128 tokens"):
    make(BadRowList("drop", None), too_long="refuse")
  refusing = BadRowList("refuse", None)
  make(refusing)
  said = (
    r"3 bad rows of 33 .*\n  talks:cut.jpg: .*\n  talks:thin.png: .*\n.* tokens, of 128 at most"
  )
  with pytest.raises(ValueError, match=said):
    refusing.settle()

  (tmp_path / "whole.jpg").unlink()
  rows = [packer(n) for n in range(packer.rows_until(2))]
  assert sum(int(row.dropped_B) for row in rows) == 2
  assert caplog.text.count("dropped, though it could be read when the run began") == 1


def test_turns_that_the_chat_template_refuses_are_bad_rows(policy, tiny_folder):
  template, special = policy.chat_template()
  template = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    + template
  )
  render = ChatRenderer(template, policy.model.cfg.family, policy.tokenizer, special)
  some = talks(tiny_folder)[-2:]
  with_system = dataclasses.replace(some[0], turns=(Turn("system", "be kind"), *some[0].turns))
  bad = BadRowList("drop", None)
  found = (ImageCheck(None), bad)
  packer = Packer([*some, with_system], render, policy.model.cfg, PackConfig(200), 0, *found)
  assert packer.examples == some
  (row,) = bad.rows
  assert row.reason == "refused by the chat template" and "no system" in row.message
