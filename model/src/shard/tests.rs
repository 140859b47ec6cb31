//! Shares of every rank: whole, without overlap, whatever the number of ranks.

use serde_json::json;

use super::*;

fn config(heads: usize, kv: usize, dim: usize, ffn: usize, vocab: usize) -> DecoderConfig {
    let config = json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": heads * dim, "head_dim": dim,
        "num_hidden_layers": 1, "num_attention_heads": heads, "num_key_value_heads": kv,
        "intermediate_size": ffn, "vocab_size": vocab, "max_position_embeddings": 64
    });
    DecoderConfig::from_json(config.to_string().as_bytes()).unwrap()
}

fn all(config: &DecoderConfig, world_size: usize) -> Vec<Shard> {
    (0..world_size).map(|rank| Shard::new(config, rank, world_size).unwrap()).collect()
}

fn tile(ranges: impl IntoIterator<Item = Range<usize>>, whole: usize) {
    let end = ranges.into_iter().fold(0, |end, range| {
        assert_eq!(range.start, end, "runs follow each other");
        assert!(!range.is_empty(), "no rank is idle");
        range.end
    });
    assert_eq!(end, whole);
}

#[test]
fn every_split_covers_the_model_once() {
    for (heads, kv, dim, ffn, vocab) in [
        (9, 3, 64, 1536, 49152),
        (64, 8, 128, 29568, 152_064),
        (64, 64, 128, 24576, 152_064),
        (14, 2, 64, 4864, 151_936),
        (28, 4, 128, 18944, 152_064),
        (40, 8, 128, 27648, 152_064),
        (6, 1, 32, 224, 306),
    ] {
        let config = config(heads, kv, dim, ffn, vocab);
        for world_size in 1..=heads {
            let shards = all(&config, world_size);
            tile(shards.iter().map(|s| s.q_heads.clone()), heads);
            tile(shards.iter().map(|s| s.hidden.clone()), heads * dim);
            tile(shards.iter().map(|s| s.ffn.clone()), ffn);
            tile(shards.iter().map(|s| s.vocab.clone()), vocab);
            for shard in &shards {
                for start in [shard.hidden.start, shard.ffn.start] {
                    assert!(start.is_multiple_of(16), "{shard:?}");
                }
                let group = heads / kv;
                for head in shard.q_heads.clone() {
                    assert!(shard.kv_heads.contains(&(head / group)), "{shard:?}");
                }
                assert!(shard.heads().q.is_multiple_of(shard.heads().kv));
                if world_size > kv {
                    assert_eq!(shard.kv_heads.start, shard.rank * kv / world_size);
                    assert_eq!(shard.kv_heads.len(), 1);
                }
            }
            if world_size <= kv {
                tile(shards.iter().map(|s| s.kv_heads.clone()), kv);
            }
            let sizes: Vec<_> = shards.iter().map(|s| s.ffn.len()).collect();
            assert!(sizes[0] - sizes[world_size - 1] <= 16, "shares differ by a run at most");
        }
    }
}

#[test]
fn three_groups_over_two_ranks_are_two_and_one() {
    let shards = all(&config(9, 3, 64, 1536, 49152), 2);
    assert_eq!((shards[0].q_heads.clone(), shards[0].kv_heads.clone()), (0..6, 0..2));
    assert_eq!((shards[1].q_heads.clone(), shards[1].kv_heads.clone()), (6..9, 2..3));
}

#[test]
fn a_width_of_231_groups_splits_over_any_number_of_ranks() {
    let shards = all(&config(64, 8, 128, 29568, 152_064), 4);
    assert!(shards.iter().all(|s| s.ffn.len() == 7392));
    let shards = all(&config(64, 8, 128, 29568, 152_064), 5);
    let widths: Vec<_> = shards.iter().map(|s| s.ffn.len() / 16).collect();
    assert_eq!(widths, [370, 370, 370, 369, 369]);
}

#[test]
fn widths_without_whole_runs_are_cut_finer() {
    let shards = all(&config(3, 1, 64, 200, 20), 3);
    let ffn: Vec<_> = shards.iter().map(|s| s.ffn.len()).collect();
    let vocab: Vec<_> = shards.iter().map(|s| s.vocab.len()).collect();
    assert_eq!((ffn, vocab), (vec![72, 64, 64], vec![8, 8, 4]));
}

#[test]
fn a_refusal_names_the_most_ranks_that_work() {
    let refused =
        |config: &DecoderConfig, world_size| match Shard::new(config, 0, world_size).unwrap_err() {
            ModelError::Ranks { max, reason, .. } => (max, reason),
            other => panic!("{other}"),
        };
    let (max, reason) = refused(&config(9, 3, 64, 1536, 49152), 10);
    assert_eq!((max, reason.as_str()), (9, "the model has 9 attention heads"));
    let (max, reason) = refused(&config(8, 8, 64, 3, 512), 4);
    assert_eq!((max, reason.as_str()), (3, "the model has 3 feed-forward columns"));
    let (max, reason) = refused(&config(8, 8, 64, 256, 3), 4);
    assert_eq!((max, reason.as_str()), (3, "the model has 3 rows in its vocabulary"));
    assert!(matches!(
        Shard::new(&config(9, 3, 64, 1536, 49152), 2, 2),
        Err(ModelError::Options(_))
    ));
}
