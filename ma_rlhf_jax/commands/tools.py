"""Flags and examples of `plan`, `bench`, `explore` and `layout`."""

import dataclasses
import os

from ma_rlhf_jax.commands.command import Command, Flag
from ma_rlhf_jax.commands.verbs import RECIPE
from ma_rlhf_jax.parallel.chips import Shares

PLAN = Command(
    'tools.plan',
    (
        Flag(
            'topology',
            'NAME',
            'The machine: a TPU slice by its chips (v5e or v6e, 1x1 to 16x16; '
            'v4, v5p or tpu7x, from 2x2x1), as v5e:4x8 or v5p:2x2x4, or '
            'gpu:KIND:NUMBER with one of b200, h200, h100, a100, a100-40, '
            'l40s, l4 and rtx4090, as gpu:h200:8. This flag is needed.',
        ),
        Flag(
            'search',
            '',
            'The cheapest settings that fit are looked for, and printed as '
            'flags. Without it the first that fit are taken.',
            default=False,
        ),
        Flag(
            'seconds',
            'SECONDS',
            'Time in which an answer is wanted. At least two layouts are '
            'compiled; no further one is started that would overrun it.',
            shown='110, and 300 with --search',
            kind=float,
            least=1,
        ),
        Flag(
            'price',
            'PRICE',
            'What one chip costs for one hour, in any currency. It adds costs '
            'to the plan.',
            shown='none, costs are not printed',
            kind=float,
            least=0,
        ),
        Flag(
            'rows',
            'ROWS',
            'How many rows the run trains on, where the task does not say it.',
            kind=int,
            least=1,
        ),
        Flag(
            'shares',
            'COMPUTE,HBM,WIRE',
            'Which share of its datasheet the machine reaches, each above 0 '
            'and up to 1: in matmuls, in memory bandwidth and between chips.',
            default=','.join(map(str, dataclasses.astuple(Shares()))),
            kind=list,
        ),
        Flag(
            'jobs',
            'N',
            'How many processes compile at once.',
            default=os.cpu_count() or 1,
            shown='one for each CPU core',
            least=1,
        ),
        Flag(
            'full',
            '',
            'Programs are compiled down to machine code, which takes ten '
            'times as long.',
            default=False,
        ),
        Flag('json', 'FILE', 'The plan is also written to this file, as JSON.'),
    ),
    (
        '--config=configs/hh_7b.py --topology=v5e:8x8 --price=1.2',
        '--config=configs/hh_7b.py:lora --topology=gpu:h100:1 --search',
    ),
    RECIPE,
)

BENCH = Command(
    'tools.bench',
    (
        Flag(
            'lengths',
            'full|hh',
            'The lengths of prompts and responses: full fills every column, '
            'hh spreads them as those of the HH data set.',
            default='full',
            kind=('full', 'hh'),
        ),
        Flag(
            'runs',
            'N',
            'How often each phase is measured, after one run that compiles.',
            default=3,
            least=1,
        ),
        Flag('json', 'FILE', 'The report is also written to this JSON file.'),
        Flag(
            'compare',
            'ONE,TWO',
            'Nothing is measured: two files of --json are printed side by '
            'side.',
            kind=list,
        ),
    ),
    (
        '--config=configs/tiny.py --lengths=hh --json=one.json',
        '--compare=one.json,two.json',
    ),
    RECIPE,
)

# Defined by `tools.explore`.
OTHER = Flag(
    'other',
    'RECIPE[:ARGUMENTS]',
    'The recipe of rule B; --other.FIELD sets a field of it. --config is that '
    'of rule A.',
    shown='--config with its fields, without macro actions (token_ppo)',
)

EXPLORE = Command(
    'tools.explore',
    (
        Flag(
            'text',
            'TEXT',
            'A response. The flag may be repeated.',
            (),
        ),
        Flag(
            'input',
            'FILE',
            'A file of responses, .jsonl or .jsonl.gz. A row may also hold '
            '`prompt`, `score`, and for each token `values`, `logprobs` and '
            '`ref_logprobs` (nats).',
        ),
        Flag(
            'column',
            'NAME',
            'The column of --input that holds the responses.',
            shown='the first of response, text and chosen',
        ),
        Flag(
            'rows',
            'N',
            'How many responses are shown.',
            default=8,
            least=1,
        ),
        Flag(
            'max_rows',
            'N',
            'How many rows of --input are read, for the statistics.',
            default=256,
            least=1,
        ),
        Flag(
            'tokenizer',
            'MODEL',
            'The tokenizer: a folder, a hub id or a workdir.',
            shown='that of --model; without one, trained on the responses',
        ),
        Flag(
            'model',
            'MODEL',
            'The reference policy, for rules that ask for probabilities: a '
            'folder, a hub id or a workdir (its PPO policy, or its SFT policy '
            'where PPO is not done).',
            shown='none, `ref_logprobs` of the rows are used',
        ),
        Flag(
            'score',
            'SCORE',
            'The terminal reward of each response, in reward-model units. A '
            'row of --input may have its own. Scores are clipped at '
            'ppo.score_clip.',
            default=1.0,
        ),
        Flag(
            'value',
            'VALUE',
            "The critic's value of each state, in reward-model units.",
            default=0.0,
        ),
        Flag('html', 'FILE', 'The result is also written to this HTML page.'),
        Flag(
            'color',
            'auto|always|never',
            'Whether the terminal shows macro actions in colour.',
            default='auto',
            kind=('auto', 'always', 'never'),
        ),
    ),
    (
        "--text='The old cat sat on the mat.' --config=configs/tiny.py:ngram=3",
        '--input=rows.jsonl --config=configs/tiny.py:termination=ppl '
        '--model=runs/mine --html=page.html',
    ),
    (*RECIPE, OTHER),
)

LAYOUT = Command(
    'tools.layout',
    (
        Flag(
            'row',
            'N',
            'The row of each stage that is shown, from 0.',
            default=0,
        ),
    ),
    (
        '--config=configs/tiny.py',
        '--config=configs/tiny.py:authors --config.sft.loss_on=text --row=3',
    ),
    RECIPE,
)
