"""What a user asks of `generate`, and what may be wrong with it."""

from collections.abc import Iterator
import dataclasses

from ma_rlhf_jax.data.prompts import text_problem
from ma_rlhf_jax.parallel.mesh import PRECISIONS

DTYPES = ('float32', 'bfloat16')
CONTEXT = 8192  # tokens that Gemma was trained on
# Below them float32 divides to infinity, or no token is left to draw from.
MIN_TEMPERATURE, MIN_TOP_P = 1e-4, 1e-6
# Of a length or a number; far above what any device holds.
_LARGEST = 2**20


@dataclasses.dataclass(frozen=True)
class Request:
  """The flags of `generate`, by their names.

  Attributes:
    model: Hugging Face folder, hub id or workdir.
    reward_model: the same; '' = responses are not scored.
    prompt: one prompt; None = `input`, or a conversation.
    input: JSONL of prompts; ''.
    output: JSONL of responses; ''.
    overwrite: replace `output`.
    temperature: >= 0; 0 = greedy.
    top_k: 0 = off.
    top_p: 1 = off.
    max_new_tokens: of a response, EOS included.
    num_samples: responses to each prompt.
    max_prompt_len: tokens, BOS included; 0 = what Gemma's context leaves.
    batch_size: responses drawn at once.
    seed: of all draws.
    dtype: weights and matmuls; '' = float32 on a CPU, bfloat16 elsewhere.
    matmul_precision: of float32 matmuls, one of `PRECISIONS`.
    tensor: devices over which each weight is split.
  """

  model: str
  reward_model: str = ''
  prompt: str | None = None
  input: str = ''
  output: str = ''
  overwrite: bool = False
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  max_new_tokens: int = 256
  num_samples: int = 1
  max_prompt_len: int = 0
  batch_size: int = 32
  seed: int = 0
  dtype: str = ''
  matmul_precision: str = 'default'
  tensor: int = 1

  @property
  def is_chat(self) -> bool:
    """Whether there is neither a prompt nor a file of them."""
    return self.prompt is None and not self.input

  @property
  def prompt_limit(self) -> int:
    """Tokens of the longest prompt, BOS included."""
    return self.max_prompt_len or max(1, CONTEXT - self.max_new_tokens)

  def check(self) -> None:
    """Raises ValueError with everything that is wrong, one line each."""
    if problems := [*self._ranges(), *self._conflicts()]:
      raise ValueError('\n  '.join(problems))

  def _ranges(self) -> Iterator[str]:
    allowed = {
        'temperature': (
            f'0, which is greedy, or from {MIN_TEMPERATURE} to 1e6',
            self.temperature == 0 or MIN_TEMPERATURE <= self.temperature <= 1e6,
        ),
        'top_k': (
            f'from 0, which is off, to {_LARGEST}',
            0 <= self.top_k <= _LARGEST,
        ),
        'top_p': (
            f'from {MIN_TOP_P} to 1, which is off; --temperature=0 is greedy',
            MIN_TOP_P <= self.top_p <= 1,
        ),
        'max_prompt_len': (
            f'from 1 to {_LARGEST}, or 0 for {CONTEXT} - max_new_tokens',
            0 <= self.max_prompt_len <= _LARGEST,
        ),
        **{
            name: (f'from 1 to {_LARGEST}', 1 <= value <= _LARGEST)
            for name, value in (
                ('max_new_tokens', self.max_new_tokens),
                ('num_samples', self.num_samples),
                ('batch_size', self.batch_size),
                ('tensor', self.tensor),
            )
        },
        'seed': ('from 0 to 2^32 - 1', 0 <= self.seed < 2**32),
        'dtype': (f'one of {DTYPES}', self.dtype in ('', *DTYPES)),
        'matmul_precision': (
            f'one of {PRECISIONS}',
            self.matmul_precision in PRECISIONS,
        ),
    }
    for name, (values, is_allowed) in allowed.items():
      value = getattr(self, name)
      if not is_allowed:
        yield f'--{name}={value} must be {values}'

  def _conflicts(self) -> Iterator[str]:
    if not self.model:
      yield '--model is missing: give a folder, a hub id or a workdir'
    if self.prompt is not None and self.input:
      yield '--prompt and --input exclude each other; give one of them'
    if self.prompt is not None and (problem := text_problem(self.prompt)):
      yield f'--prompt {problem}'
    if self.input and not self.output:
      yield f'--input={self.input} needs --output=FILE.jsonl'
    if self.output and not self.input:
      yield f'--output={self.output} needs --input=FILE.jsonl'
    for name in ('input', 'output'):
      if '://' in getattr(self, name):
        yield f'--{name}={getattr(self, name)} must be a local file'
    if self.output.endswith('.gz'):
      yield f'--output={self.output} is written uncompressed; leave out .gz'
    if not self.max_prompt_len and CONTEXT <= self.max_new_tokens <= _LARGEST:
      yield (
          f'--max_new_tokens={self.max_new_tokens} leaves no room for a prompt '
          f'in the {CONTEXT} tokens of Gemma; give fewer, or --max_prompt_len '
          'to go beyond them'
      )
    if self.temperature == 0 and self.num_samples > 1:
      yield (
          f'--num_samples={self.num_samples} at --temperature=0 would be the '
          'same response each time; raise the temperature, or draw one'
      )
    if self.is_chat and (self.reward_model or self.num_samples > 1):
      yield (
          '--reward_model and --num_samples need --prompt or --input; a '
          'conversation shows one answer while it is drawn'
      )
