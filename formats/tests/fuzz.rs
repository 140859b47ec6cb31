//! Damages valid files in every way a seeded generator thinks of. No reader may panic, and none may
//! allocate more than the file's own size allows.

mod common;

use common::{GgufFile, safetensors, string};
use formats::{gguf, safetensors as st};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

const ROUNDS: usize = 200_000;
/// In-memory lists against their bytes in the file: three times for strings, more for JSON.
const BYTES_PER_BYTE: usize = 24;
/// A read buffer and error messages.
const BYTES_FIXED: usize = 100_000;

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }
}

fn gguf_seeds() -> Vec<Vec<u8>> {
    let mut plain = GgufFile::new();
    plain
        .text("general.architecture", "qwen2")
        .u32("qwen2.block_count", 24)
        .f32("qwen2.rope.freq_base", 1e6)
        .entry("tokenizer.ggml.add_bos_token", 7, &[0])
        .strings("tokenizer.ggml.tokens", &["a", "bc", "def", "Ġg"])
        .tensor("token_embd.weight", &[32, 4], 2, &[3; 72])
        .tensor("output_norm.weight", &[8], 0, &[0; 32])
        .tensor("blk.0.ffn_down.weight", &[256, 1], 14, &[9; 210]);
    let nested = [&9u32.to_le_bytes()[..], &2u64.to_le_bytes()].concat();
    let inner = [&5u32.to_le_bytes()[..], &2u64.to_le_bytes(), &[7; 8]].concat();
    let mut odd = GgufFile::new();
    odd.version = 2;
    odd.u32("general.alignment", 64)
        .entry("nested", 9, &[nested, inner.clone(), inner].concat())
        .entry("u64", 10, &[1; 8])
        .entry("i16", 3, &[1; 2])
        .entry("f64", 12, &[1; 8])
        .entry("bytes", 9, &[&0u32.to_le_bytes()[..], &40u64.to_le_bytes(), &[5; 40]].concat());
    odd.alignment = 64;
    odd.tensor("x", &[1, 2, 3, 4], 30, &[0; 48]);
    vec![plain.bytes(), odd.bytes(), GgufFile::new().bytes()]
}

fn safetensors_seeds() -> Vec<Vec<u8>> {
    let header = concat!(
        r#"{"__metadata__":{"format":"pt","a":["b",{"c":null}]},"#,
        r#""model.embed_tokens.weight":{"dtype":"BF16","shape":[4,8],"data_offsets":[0,64]},"#,
        r#""model.norm.weight":{"dtype":"F32","shape":[8],"data_offsets":[64,96]},"#,
        r#""\u0078":{"shape":[],"data_offsets":[96,98],"dtype":"F16"}}   "#
    );
    vec![safetensors(header, &[1; 98]), safetensors("{}", &[])]
}

/// One to eight changes: bits, bytes, numbers, cuts, repeats and swaps.
fn mutate(random: &mut Random, seed: &[u8], other: &[u8]) -> Vec<u8> {
    let mut file = seed.to_vec();
    for _ in 0..=random.below(8) {
        let at = random.below(file.len());
        let run = random.below(24).min(file.len() - at);
        match random.below(9) {
            0 if !file.is_empty() => file[at] ^= 1 << random.below(8),
            1 if !file.is_empty() => file[at] = random.next() as u8,
            2 => file.truncate(at),
            3 => drop(file.drain(at..at + run)),
            4 => file
                .splice(at..at, other[random.below(other.len())..].iter().copied().take(run))
                .for_each(drop),
            5 => {
                let copy = file[at..at + run].to_vec();
                file.splice(at..at, copy).for_each(drop);
            }
            6 if file.len() >= 8 => {
                let numbers = [0, 1, u64::MAX, 1 << 63, 1 << 40, file.len() as u64, random.next()];
                let number = numbers[random.below(numbers.len())] >> (random.below(2) * 32);
                let at = random.below(file.len() - 7);
                file[at..at + 8].copy_from_slice(&number.to_le_bytes());
            }
            7 if file.len() >= 4 => {
                let at = random.below(file.len() - 3);
                file[at..at + 4].copy_from_slice(&(random.below(16) as u32).to_le_bytes());
            }
            8 => {
                let digits =
                    [&b"99999999999999999999"[..], b"-1", b"[[[[[", b"\"\"", b"1e9", b"{}"];
                let token = digits[random.below(digits.len())];
                file.splice(at..at + run.min(3), token.iter().copied()).for_each(drop);
            }
            _ => {}
        }
    }
    file
}

/// Headers whose length is right again, so that damage reaches the JSON behind it.
fn with_length(file: &[u8], header_len: usize) -> Vec<u8> {
    match file.get(8..8 + header_len.min(file.len().saturating_sub(8))) {
        Some(header) => {
            [&(header.len() as u64).to_le_bytes()[..], header, &file[8 + header.len()..]].concat()
        }
        None => string(""),
    }
}

fn bounded<T>(
    file: &[u8],
    accepted: &mut usize,
    read: impl Fn(&[u8]) -> Result<T, formats::FormatError>,
) {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let result = read(file);
    let used = ALLOCATOR.peak_usage().saturating_sub(before);
    let allowed = BYTES_FIXED + BYTES_PER_BYTE * file.len();
    assert!(used <= allowed, "{used} bytes for a file of {}: {file:?}", file.len());
    match result {
        Ok(_) => *accepted += 1,
        Err(error) => assert!(error.to_string().len() < 2000, "{error}"),
    }
}

#[test]
fn damaged_files_are_refused_without_panic_or_waste() {
    let mut random = Random(0x5EED);
    let (ggufs, safetensors) = (gguf_seeds(), safetensors_seeds());
    let mut accepted = 0;
    for seed in &ggufs {
        bounded(seed, &mut accepted, gguf::parse);
    }
    for seed in &safetensors {
        bounded(seed, &mut accepted, st::parse);
    }
    assert_eq!(accepted, ggufs.len() + safetensors.len(), "the seeds themselves are sound");
    for _ in 0..ROUNDS {
        let seed = &ggufs[random.below(ggufs.len())];
        let file = mutate(&mut random, seed, &ggufs[0]);
        bounded(&file, &mut accepted, gguf::parse);
        bounded(&file, &mut accepted, gguf::parse_metadata);
        let seed = &safetensors[usize::from(random.below(8) == 0)];
        let mut file = mutate(&mut random, seed, &safetensors[0]);
        if random.next().is_multiple_of(2) {
            file = with_length(&file, seed.len() - 8 - if seed.len() > 98 { 98 } else { 0 });
        }
        bounded(&file, &mut accepted, st::parse);
        bounded(file.get(8..).unwrap_or_default(), &mut accepted, st::Index::parse);
    }
    assert!(
        accepted > ROUNDS / 100,
        "only {accepted} accepted: the damage never gets past the door"
    );
}
