//! Short names of the official Qwen repositories.

/// Short name, repository, parameters, what it is for.
const NAMES: &[(&str, &str, &str)] = &[
    ("qwen-1.8b-chat", "Qwen/Qwen-1_8B-Chat", "original Qwen, 1.8 B"),
    ("qwen-7b-chat", "Qwen/Qwen-7B-Chat", "original Qwen, 7 B"),
    ("qwen-14b-chat", "Qwen/Qwen-14B-Chat", "original Qwen, 14 B"),
    ("qwen-72b", "Qwen/Qwen-72B", "original Qwen, 72 B, base"),
    ("qwen-72b-chat", "Qwen/Qwen-72B-Chat", "original Qwen, 72 B"),
    ("qwen-72b-chat-int4", "Qwen/Qwen-72B-Chat-Int4", "original Qwen, 72 B, GPTQ"),
    ("qwen1.5-0.5b", "Qwen/Qwen1.5-0.5B-Chat", "0.5 B"),
    ("qwen1.5-1.8b", "Qwen/Qwen1.5-1.8B-Chat", "1.8 B"),
    ("qwen1.5-4b", "Qwen/Qwen1.5-4B-Chat", "4 B"),
    ("qwen1.5-7b", "Qwen/Qwen1.5-7B-Chat", "7 B"),
    ("qwen1.5-14b", "Qwen/Qwen1.5-14B-Chat", "14 B"),
    ("qwen1.5-32b", "Qwen/Qwen1.5-32B-Chat", "32 B"),
    ("qwen1.5-72b", "Qwen/Qwen1.5-72B-Chat", "72 B"),
    ("qwen1.5-moe-a2.7b", "Qwen/Qwen1.5-MoE-A2.7B-Chat", "experts, 14 B, 2.7 B active"),
    ("qwen2-0.5b", "Qwen/Qwen2-0.5B-Instruct", "0.5 B"),
    ("qwen2-1.5b", "Qwen/Qwen2-1.5B-Instruct", "1.5 B"),
    ("qwen2-7b", "Qwen/Qwen2-7B-Instruct", "7 B"),
    ("qwen2-72b", "Qwen/Qwen2-72B-Instruct", "72 B"),
    ("qwen2-57b-a14b", "Qwen/Qwen2-57B-A14B-Instruct", "experts, 57 B, 14 B active"),
    ("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B-Instruct", "0.5 B"),
    ("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B-Instruct", "1.5 B"),
    ("qwen2.5-3b", "Qwen/Qwen2.5-3B-Instruct", "3 B"),
    ("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct", "7 B"),
    ("qwen2.5-7b-int4", "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "7 B, GPTQ"),
    ("qwen2.5-14b", "Qwen/Qwen2.5-14B-Instruct", "14 B"),
    ("qwen2.5-32b", "Qwen/Qwen2.5-32B-Instruct", "32 B"),
    ("qwen2.5-32b-int4", "Qwen/Qwen2.5-32B-Instruct-GPTQ-Int4", "32 B, GPTQ"),
    ("qwen2.5-72b", "Qwen/Qwen2.5-72B-Instruct", "72 B"),
    ("qwen2.5-72b-int4", "Qwen/Qwen2.5-72B-Instruct-GPTQ-Int4", "72 B, GPTQ"),
    ("qwen2.5-72b-awq", "Qwen/Qwen2.5-72B-Instruct-AWQ", "72 B, AWQ"),
    ("qwen2.5-coder-0.5b", "Qwen/Qwen2.5-Coder-0.5B-Instruct", "code, 0.5 B"),
    ("qwen2.5-coder-7b", "Qwen/Qwen2.5-Coder-7B-Instruct", "code, 7 B"),
    ("qwen2.5-coder-32b", "Qwen/Qwen2.5-Coder-32B-Instruct", "code, 32 B"),
    ("qwen3-0.6b", "Qwen/Qwen3-0.6B", "0.6 B"),
    ("qwen3-1.7b", "Qwen/Qwen3-1.7B", "1.7 B"),
    ("qwen3-4b", "Qwen/Qwen3-4B", "4 B"),
    ("qwen3-8b", "Qwen/Qwen3-8B", "8 B"),
    ("qwen3-14b", "Qwen/Qwen3-14B", "14 B"),
    ("qwen3-32b", "Qwen/Qwen3-32B", "32 B"),
    ("qwen3-30b-a3b", "Qwen/Qwen3-30B-A3B", "experts, 30 B, 3 B active"),
    ("qwen3-235b-a22b", "Qwen/Qwen3-235B-A22B", "experts, 235 B, 22 B active"),
];

/// The repository that a short name stands for.
pub fn repository(name: &str) -> Option<String> {
    let known = NAMES.iter().find(|(short, ..)| short.eq_ignore_ascii_case(name))?;
    Some(known.1.to_owned())
}

/// The known name that differs least, if it differs little.
pub fn nearest(name: &str) -> Option<&'static str> {
    let all = NAMES.iter().map(|(short, ..)| *short).chain([super::demo::NAME]);
    let (distance, near) = all.map(|known| (distance(known, name), known)).min()?;
    (distance <= 2).then_some(near)
}

/// Single-letter edits between two names.
pub fn distance(one: &str, other: &str) -> usize {
    let other: Vec<_> = other.chars().take(64).collect();
    let mut row: Vec<_> = (0..=other.len()).collect();
    for (i, a) in one.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &b) in other.iter().enumerate() {
            let replaced = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[other.len()]
}

/// One line for each name, for `lockstep pull --list`.
pub fn listing() -> String {
    let demo = (super::demo::NAME, "SmolLM2-135M-Instruct Q4_1, 98 MB", "from PyPI");
    let lines = std::iter::once(&demo).chain(NAMES);
    let lines: Vec<_> =
        lines.map(|(name, from, what)| format!("{name:<20} {from:<36} {what}")).collect();
    lines.join("\n")
}
