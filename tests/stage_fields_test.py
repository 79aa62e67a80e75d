"""The fields of the stages that train."""

from ma_rlhf_jax.stage_fields import BLOCKS


def test_every_trained_model_has_the_same_adamw_but_for_its_rate() -> None:
  optims = {
      stage: {
          name.removeprefix('optim.'): field
          for name, field in block.fields.items()
          if name.startswith('optim.')
      }
      for stage, block in BLOCKS.items()
  }
  rates = {stage: made.pop('lr').default for stage, made in optims.items()}
  assert rates == {
      'sft': 2e-5,
      'reward_model': 1e-5,
      'ppo': 1.5e-5,
      'critic': 1.5e-5,
  }
  first, *others = (
      {name: field.default for name, field in made.items()}
      for made in optims.values()
  )
  assert len(first) == 9 and all(other == first for other in others)


def test_supervised_stages_say_what_their_rows_are() -> None:
  meaning = lambda stage: BLOCKS[stage].fields['batch_size'].meaning
  assert meaning('sft') == 'Sequences per update.'
  assert meaning('reward_model') == 'Pairs per update.'
  assert meaning('ppo') == 'Prompts per step.'
