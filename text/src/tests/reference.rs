//! The encoder's ids are those of the `tokenizers` crate, for every kind of split and any text.

use super::Random;
use super::vocabulary::{golden, qwen1, qwen2, turned_round};
use crate::EncoderKind::{self, Own, Reference};
use crate::tokenizer::Vocabulary;
use crate::tokenizer::byte_level::Loaded;
use crate::{Files, TextError};

/// One vocabulary in both encoders.
struct Pair {
    name: &'static str,
    own: Vocabulary,
    reference: Vocabulary,
}

impl Pair {
    fn new(name: &'static str, files: &Files) -> Self {
        let loaded = || Vocabulary::read(files).unwrap().unwrap();
        let own = Vocabulary::new(loaded()).unwrap();
        let reference = Vocabulary::new(Loaded { merges: None, ..loaded() }).unwrap();
        assert_eq!((own.encoder(), reference.encoder()), (Own, Reference), "{name}");
        Self { name, own, reference }
    }

    fn check(&self, text: &str, seed: u64) {
        let ids = |v: &Vocabulary| {
            [v.encode_literal(text, true), v.encode_protected(text), v.encode(text, true)]
                .map(Result::unwrap)
        };
        let (own, reference) = (ids(&self.own), ids(&self.reference));
        assert_eq!(own, reference, "{} seed {seed}: {text:?}", self.name);
    }
}

/// Every way to cut words that is known, in every form of files.
fn pairs() -> Vec<Pair> {
    let json = golden("public/qwen2_gqa4_tied_sharded/tokenizer.json");
    vec![
        Pair::new("original qwen", &qwen1()),
        Pair::new("qwen3", &qwen2(26, "qwen3-0.6b.jinja")),
        Pair::new("tokenizer.json", &Files::from([("tokenizer.json".to_owned(), json)])),
        Pair::new("qwen, turned round", &turned_round("qwen2")),
        Pair::new("llama 3, turned round", &turned_round("llama-bpe")),
        Pair::new("smollm, turned round", &turned_round("smollm")),
        Pair::new("gpt-2, turned round", &turned_round("gpt-2")),
    ]
}

const PARTS: [&str; 88] = [
    "a",
    "Hello",
    " world",
    "the",
    "\n",
    "\r\n",
    "\r",
    "\t",
    " ",
    "  ",
    "   ",
    "        ",
    "\n\n",
    " \n",
    "\n ",
    "1",
    "23",
    "4567",
    "3.14",
    "½",
    "Ⅷ",
    "٣",
    "²",
    "①",
    "é",
    "e\u{301}",
    "ﬁ",
    "ß",
    "ǅ",
    "ʰ",
    "漢字",
    "。",
    "、",
    "ひらがな",
    "한국어",
    "\u{1112}\u{1161}\u{11ab}",
    "עברית",
    "ไทย",
    "हिन्दी",
    "தமிழ்",
    "العربية",
    "Ελληνικά",
    "русский",
    "🙂",
    "👩\u{200d}👩\u{200d}👧",
    "🇩🇪",
    "👍🏽",
    "\u{fe0f}",
    "'s",
    "'S",
    "'\u{17f}",
    "'t",
    "'T",
    "'re",
    "'RE",
    "'rE",
    "'ve",
    "'m",
    "'ll",
    "'LL",
    "'d",
    "'",
    "''",
    "\u{2019}s",
    "\u{212a}",
    "\u{212b}",
    "\u{a0}",
    "\u{3000}",
    "\u{85}",
    "\u{2028}",
    "\u{200b}",
    "\u{feff}",
    "\u{0}",
    "\u{fffd}",
    "\u{378}",
    "\u{e000}",
    "\u{10fffd}",
    "fn main() {",
    "}\n\n",
    "--",
    "...",
    "=>",
    "<|im_end|>",
    "<|",
    "|>",
    "<tool_call>",
    "</think>",
    "\u{323}\u{307}",
];

/// Parts of texts beside any characters, often the same one again.
fn text(random: &mut Random) -> String {
    let mut text = String::new();
    for _ in 0..random.below(20) {
        let ranges = [0x80, 0x250, 0x3000, 0x2_0000, 0x11_0000];
        match random.below(8) {
            0 | 1 => {
                let range = ranges[random.below(ranges.len() as u64) as usize];
                let c = char::from_u32(random.below(range) as u32).unwrap_or('\u{d7ff}');
                let again = if random.below(6) == 0 { random.below(70) } else { 0 };
                text.extend((0..=again).map(|_| c));
            }
            2 => {
                let letter = |random: &mut Random| char::from(b'a' + random.below(26) as u8);
                text.extend((0..random.below(12)).map(|_| letter(random)));
            }
            _ => text.push_str(PARTS[random.below(PARTS.len() as u64) as usize]),
        }
    }
    text
}

/// As many texts from each seed on; a difference names the seed that gives the text.
fn compare(seeds: std::ops::Range<u64>) {
    let pairs = pairs();
    for seed in seeds {
        let text = text(&mut Random::new(seed));
        pairs.iter().for_each(|pair| pair.check(&text, seed));
    }
}

#[test]
fn ids_are_those_of_the_reference() {
    compare(0..20_000);
}

/// A million texts, from the seed in `LOCKSTEP_SEED` on.
#[test]
#[ignore = "minutes: a million texts"]
fn soak_ids_are_those_of_the_reference() {
    let first = std::env::var("LOCKSTEP_SEED").map_or(1 << 32, |seed| seed.parse().unwrap());
    compare(first..first + 1_000_000);
}

/// In words and alone: every character up to the CJK ideographs, and every `step`th of the others.
fn characters(step: usize) {
    let pairs = pairs();
    let others = ('\u{3400}'..=char::MAX).step_by(step);
    let all: Vec<char> = ('\0'..'\u{3400}').chain(others).collect();
    for (seed, block) in all.chunks(32).enumerate() {
        let text: String = block.iter().map(|c| format!("a{c}e{c} {c}{c}1\n{c}'{c}")).collect();
        pairs.iter().for_each(|pair| pair.check(&text, seed as u64));
    }
}

#[test]
fn every_kind_of_character_is_cut_as_the_reference_does() {
    characters(211);
}

#[test]
#[ignore = "minutes: every character there can be"]
fn soak_every_character_is_cut_as_the_reference_does() {
    characters(1);
}

/// What the encoder does not know stays with the reference.
#[test]
fn unknown_steps_are_left_to_the_reference() {
    let json = golden("public/qwen2_gqa4_tied_sharded/tokenizer.json");
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    type Change = fn(&mut serde_json::Value);
    let changes: [(EncoderKind, Change); 6] = [
        (Own, |_| {}),
        (Reference, |json| json["normalizer"] = serde_json::json!({"type": "NFKC"})),
        (Reference, |json| {
            json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "\\w+".into();
        }),
        (Reference, |json| json["added_tokens"][0]["special"] = false.into()),
        (Reference, |json| json["model"]["dropout"] = 0.5.into()),
        (Reference, |json| {
            json["model"]["vocab"].as_object_mut().unwrap().remove("Ā");
        }),
    ];
    for (at, (encoder, change)) in changes.into_iter().enumerate() {
        let mut json = json.clone();
        change(&mut json);
        if at == 3 {
            json["added_tokens"][0]["lstrip"] = true.into();
        }
        let files = Files::from([("tokenizer.json".to_owned(), json.to_string().into_bytes())]);
        let vocabulary = Vocabulary::load(&files).unwrap().unwrap();
        assert_eq!(vocabulary.encoder(), encoder, "change {at}");
        // The reference's pattern gives up on so much whitespace in a row.
        let blank = vocabulary.encode(&"\n".repeat(300_000), false);
        let refused = matches!(blank, Err(TextError::Input(_)));
        assert_eq!(refused, encoder == Reference, "change {at}");
    }
}
