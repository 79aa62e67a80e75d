"""Flags and examples of `train`, `generate`, `evaluate` and `export`."""

from ma_rlhf_jax.commands.command import Command, Flag

# Defined by `recipe_flag`.
RECIPE = (
    Flag(
        'config',
        'RECIPE[:ARGUMENTS]',
        'The recipe: a Python file whose `get_config` makes the config. After '
        'a colon come its arguments, separated by commas. These are words '
        '(the variants ours, paper and authors; the controls token_ppo, '
        'lambda_matched, piecewise, kl_matched, kl_summed, kl_averaged, '
        'lambda_one, one_macro and rloo; lora for adapters) and values '
        '(ngram=TOKENS, seed=NUMBER, termination=RULE), as in '
        'RECIPE:paper,ngram=3.',
        shown='configs/tiny.py, a small model for 2 CPU cores',
    ),
    Flag(
        'config.FIELD',
        'VALUE',
        'Overrides a field of the config, as in --config.ppo.kl_coef=0.1 or '
        '--config.log.sinks="(\'jsonl\',)". The flag may be repeated. '
        'ma_rlhf_jax/config.py lists every field with its meaning, unit and '
        'default.',
    ),
)

# Defined by `cluster_flags`.
PROCESSES = (
    Flag(
        'coordinator_address',
        'HOST:PORT',
        'Where process 0 can be reached, for a run of several processes on '
        'GPUs or CPUs. On TPU pods and under srun the processes find each '
        'other without this flag and the next three.',
        default='',
        shown='none, one process',
    ),
    Flag(
        'num_processes',
        'N',
        'The number of processes. It goes with --coordinator_address.',
        default=0,
        shown='none, one process',
    ),
    Flag(
        'process_id',
        'I',
        'The number of this process, from 0. It goes with '
        '--coordinator_address.',
        default=-1,
        shown='none, one process',
    ),
    Flag(
        'initialization_timeout',
        'SECONDS',
        'How long the processes wait for each other at the start.',
        default=300,
    ),
)

TRAIN = Command(
    'train',
    (
        Flag(
            'workdir',
            'DIR',
            'The folder that everything is written to; also gs://. The same '
            'folder again resumes the run in it.',
            shown='runs/NAME-HASH, by the recipe and its config',
        ),
    ),
    (
        '--config=configs/tiny.py --workdir=runs/mine',
        '--config=configs/hh_2b.py:lora --config.data.path=Dahoas/full-hh-rlhf '
        '--config.mesh.fsdp=4',
    ),
    RECIPE,
    PROCESSES,
)

# The defaults are those of `generation.request.Request`.
GENERATE = Command(
    'generate',
    (
        Flag(
            'model',
            'MODEL',
            'The policy: a Hugging Face folder, a hub id, a workdir (its PPO '
            'policy, or its SFT policy where PPO is not done) or '
            'WORKDIR:STAGE. This flag is needed.',
            default='',
        ),
        Flag('prompt', 'TEXT', 'One prompt, whose response is printed.'),
        Flag(
            'input',
            'FILE',
            'A file of prompts, .jsonl or .jsonl.gz, with `prompt` in each '
            'row. It needs --output.',
            default='',
        ),
        Flag(
            'output',
            'FILE',
            'The .jsonl file that the responses to --input are written to. '
            'Until it is whole, its rows are in FILE.partial.',
            default='',
        ),
        Flag(
            'overwrite',
            '',
            '--output and its .partial are replaced where they exist.',
            default=False,
        ),
        Flag(
            'reward_model',
            'MODEL',
            'A reward model, named as --model is. It scores every response, '
            'and the best of --num_samples is written.',
            default='',
            shown='none, responses are not scored',
        ),
        Flag(
            'num_samples',
            'N',
            'How many responses are drawn for each prompt.',
            default=1,
        ),
        Flag(
            'max_new_tokens',
            'TOKENS',
            'The longest response, EOS included.',
            default=256,
        ),
        Flag(
            'max_prompt_len',
            'TOKENS',
            'The longest prompt, BOS included. A longer one is an error; a '
            'conversation forgets its oldest turns instead.',
            default=0,
            shown='0, which stands for 8192 - max_new_tokens',
        ),
        Flag(
            'temperature',
            'T',
            'The logits are divided by it; 0 = greedy.',
            default=1.0,
        ),
        Flag(
            'top_k',
            'TOKENS',
            'Only this many most probable tokens can be drawn; 0 = all.',
            default=0,
        ),
        Flag(
            'top_p',
            'SHARE',
            'Only the most probable tokens that together have this '
            'probability can be drawn; 1 = all.',
            default=1.0,
        ),
        Flag(
            'seed',
            'NUMBER',
            'The seed of the random draws. The same seed gives the same '
            'responses.',
            default=0,
        ),
        Flag(
            'batch_size',
            'RESPONSES',
            'How many responses are drawn at once, on all devices together.',
            default=32,
        ),
        Flag(
            'dtype',
            'DTYPE',
            'The type of weights and matmuls: float32 or bfloat16.',
            default='',
            shown='float32 on a CPU, bfloat16 elsewhere',
        ),
        Flag(
            'matmul_precision',
            'PRECISION',
            'The precision of matmuls in float32: default (that of the '
            'device), high or highest.',
            default='default',
        ),
        Flag(
            'tensor',
            'DEVICES',
            'How many devices each weight is split over, where one device has '
            'too little memory for all weights.',
            default=1,
        ),
    ),
    (
        "--model=runs/mine --prompt='My boss was late again.'",
        '--model=runs/mine --input=prompts.jsonl --output=responses.jsonl '
        '--temperature=0.7 --num_samples=4 --reward_model=runs/mine',
    ),
)

EVALUATE = Command(
    'evaluate',
    (
        Flag(
            'workdir',
            'DIR',
            'The folder of a run in which PPO is done. This flag is needed.',
        ),
        Flag(
            'prompts',
            'N',
            'How many held-out prompts are answered; 0 = as many as '
            'evaluate.prompts of the run says.',
            default=0,
        ),
    ),
    ('--workdir=runs/mine', '--workdir=gs://my-bucket/run --prompts=64'),
    processes=PROCESSES,
)

# The defaults are those of `export.Request`.
EXPORT = Command(
    'export',
    (
        Flag(
            'workdir',
            'DIR',
            'The folder of the run that trained the model. This flag is '
            'needed.',
        ),
        Flag(
            'output',
            'DIR',
            'The folder that is made; also gs://. This flag is needed.',
        ),
        Flag(
            'stage',
            'STAGE',
            'The model that is exported: sft, reward_model, ppo or critic.',
            default='ppo',
        ),
        Flag(
            'dtype',
            'DTYPE',
            'The type of the weights: float32 or bfloat16.',
            default='',
            shown='the type that they were trained in',
        ),
        Flag(
            'max_shard_size',
            'BYTES',
            'The largest size of one file of weights, as 5GB or 500MB.',
            default='5GB',
        ),
        Flag(
            'adapter',
            '',
            'Only the LoRA adapters are exported, as a folder for peft.',
            default=False,
        ),
        Flag(
            'base',
            'USER/NAME',
            'With --adapter: the hub id of the model that the adapters belong '
            'to, where the run started from a local folder.',
            default='',
            shown='the hub id that the run started from',
        ),
        Flag(
            'prompts',
            'FILE',
            'The export is checked on the rows of this JSONL file, each with '
            '`prompt`, and for scores `response`.',
            default='',
            shown='held-out rows of the run',
        ),
        Flag(
            'overwrite',
            '',
            'An earlier export in --output is replaced.',
            default=False,
        ),
        Flag(
            'push_to_hub',
            'USER/NAME',
            'The export is also uploaded to this repository of the hub, which '
            'is private where it is new. The token comes from HF_TOKEN or '
            'from `hf auth login`.',
            default='',
            shown='none, nothing is uploaded',
        ),
    ),
    (
        '--workdir=runs/mine --output=exports/policy',
        '--workdir=runs/mine --stage=reward_model --output=exports/scores '
        '--dtype=bfloat16 --push_to_hub=me/my-reward-model',
    ),
)
