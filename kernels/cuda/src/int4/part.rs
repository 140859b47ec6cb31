//! 4-bit weights as checkpoints store them.

use half::f16;
use kernels::KernelError;

/// Numbers in a 32-bit word.
const WORD: usize = 8;

/// How numbers and zero points lie in words of eight nibbles, the lowest bits first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Int4Layout {
    /// qweight [K / 8, N]: eight columns of a row in a word. qzeros [G, N / 8]: eight rows in a
    /// word, each zero point stored as one less than it is (15 means 16).
    Gptq,
    /// As `Gptq`, zero points stored as they are (`checkpoint_format` "gptq_v2").
    GptqV2,
    /// qweight [K, N / 8] and qzeros [G, N / 8]: eight rows in a word in the order 0, 2, 4, 6, 1,
    /// 3, 5, 7; zero points stored as they are.
    Awq,
}

/// A stored matrix [N, K], or a rank's rows and columns of one: W[n, k] = (q − zero) · scale, with
/// zero and scale of row n and of k's group. Tensors are the checkpoint's bytes, row-major.
#[derive(Clone, Copy, Debug)]
pub struct Int4Part<'a> {
    pub layout: Int4Layout,
    /// N, a multiple of 8.
    pub rows: usize,
    /// K, a multiple of 8.
    pub cols: usize,
    /// Columns that share a zero point and a scale: a multiple of 32.
    pub group: usize,
    /// Columns between the start of the first group in `scales` and column 0, a multiple of 8:
    /// column k is of group (k + `first_col`) / `group`. Not 0 where a rank's columns begin inside
    /// a group.
    pub first_col: usize,
    /// int32, K · N / 8 words.
    pub qweight: &'a [u8],
    /// int32, G · N / 8 words.
    pub qzeros: &'a [u8],
    /// f16 [G, N].
    pub scales: &'a [u8],
    /// int32 [K], the group of each column where columns were quantised in another order than they
    /// lie (GPTQ's g_idx, act-order); `first_col` is 0 then.
    pub column_groups: Option<&'a [u8]>,
}

fn words(bytes: &[u8]) -> &[[u8; 4]] {
    bytes.as_chunks().0
}

/// Nibble `at` of a word.
fn nibble(word: [u8; 4], at: usize) -> u8 {
    (u32::from_le_bytes(word) >> (4 * at) & 15) as u8
}

/// Where row `n` of eight lies in an AWQ word: the even ones first.
fn awq_nibble(n: usize) -> usize {
    let n = n % WORD;
    if n.is_multiple_of(2) { n / 2 } else { WORD / 2 + n / 2 }
}

impl Int4Part<'_> {
    /// G.
    pub(super) fn groups(&self) -> usize {
        self.scales.len() / size_of::<f16>() / self.rows.max(1)
    }

    /// The group of column `k`, wherever that lies.
    pub(super) fn group_of(&self, k: usize) -> usize {
        match self.column_groups {
            // A negative index becomes a large one, which no group has.
            Some(groups) => i32::from_le_bytes(words(groups)[k]) as u32 as usize,
            None => (k + self.first_col) / self.group,
        }
    }

    /// Every tensor is as long as the shape says, and every column has a group.
    pub(super) fn check(&self) -> Result<(), KernelError> {
        self.check_shape().and_then(|()| self.check_groups()).map_err(KernelError::Weight)
    }

    fn check_shape(&self) -> Result<(), String> {
        let Self { rows, cols, group, first_col, .. } = *self;
        if rows == 0 || cols == 0 || !rows.is_multiple_of(WORD) || !cols.is_multiple_of(WORD) {
            return Err(format!(
                "int4 [{rows}, {cols}]: both must be positive multiples of {WORD}"
            ));
        }
        if group == 0 || !group.is_multiple_of(32) {
            return Err(format!("int4 groups of {group} columns: no multiple of 32"));
        }
        if !first_col.is_multiple_of(WORD) {
            return Err(format!(
                "int4 columns that begin {first_col} after a group: no multiple of {WORD}; cut the \
                 ranks' columns at multiples of {WORD}"
            ));
        }
        let Some(quants) = rows.checked_mul(cols).map(|quants| quants / 2) else {
            return Err(format!("int4 [{rows}, {cols}] is too large"));
        };
        let groups = self.groups();
        let lengths = [
            ("qweight", self.qweight.len(), quants),
            ("scales", self.scales.len(), groups * rows * size_of::<f16>()),
            ("qzeros", self.qzeros.len(), groups * rows / 2),
        ];
        for (name, has, wanted) in lengths {
            if has != wanted {
                return Err(format!(
                    "{name} of int4 [{rows}, {cols}] with {groups} groups has {has} bytes, wanted \
                     {wanted}"
                ));
            }
        }
        Ok(())
    }

    fn check_groups(&self) -> Result<(), String> {
        let groups = self.groups();
        if let Some(bytes) = self.column_groups {
            let (has, wanted) = (bytes.len(), self.cols * size_of::<i32>());
            if has != wanted {
                return Err(format!("g_idx has {has} bytes, wanted {wanted}"));
            }
            if self.first_col != 0 {
                return Err(format!(
                    "g_idx beside a first column of {}: g_idx alone says the groups",
                    self.first_col
                ));
            }
        }
        let highest = (0..self.cols).map(|k| self.group_of(k)).max().unwrap_or(0);
        if highest >= groups {
            return Err(format!("a column is of group {highest} of {groups}"));
        }
        Ok(())
    }

    /// The number of row `n`, column `k`.
    pub(super) fn quant(&self, n: usize, k: usize) -> u8 {
        let words = words(self.qweight);
        match self.layout {
            Int4Layout::Gptq | Int4Layout::GptqV2 => {
                nibble(words[k / WORD * self.rows + n], k % WORD)
            }
            Int4Layout::Awq => nibble(words[(k * self.rows + n) / WORD], awq_nibble(n)),
        }
    }

    /// The zero point of row `n` in a group, 0 to 16.
    pub(super) fn zero(&self, n: usize, group: usize) -> u8 {
        let word = words(self.qzeros)[(group * self.rows + n) / WORD];
        match self.layout {
            Int4Layout::Gptq => nibble(word, n % WORD) + 1,
            Int4Layout::GptqV2 => nibble(word, n % WORD),
            Int4Layout::Awq => nibble(word, awq_nibble(n)),
        }
    }

    /// The scale of row `n` in a group.
    pub(super) fn scale(&self, n: usize, group: usize) -> f16 {
        f16::from_le_bytes(self.scales.as_chunks().0[group * self.rows + n])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn awq_nibbles_are_where_the_order_says() {
        for (at, n) in [0, 2, 4, 6, 1, 3, 5, 7].into_iter().enumerate() {
            assert_eq!(awq_nibble(n), at);
            assert_eq!(awq_nibble(n + 16), at);
        }
    }

    fn part<'a>(layout: Int4Layout, [qweight, qzeros, scales]: [&'a [u8]; 3]) -> Int4Part<'a> {
        let (rows, cols, group, first_col) = (8, 8, 32, 0);
        let column_groups = None;
        Int4Part { layout, rows, cols, group, first_col, qweight, qzeros, scales, column_groups }
    }

    #[test]
    fn words_are_read_as_each_layout_stores_them() {
        // Word i is 0x76543210 + i in its lowest nibble.
        let qweight: Vec<u8> = (0..8u32).flat_map(|i| (0x7654_3210 + i).to_le_bytes()).collect();
        let (qzeros, scales) = (0xf654_3210u32.to_le_bytes(), [0; 16]);
        let tensors: [&[u8]; 3] = [&qweight, &qzeros, &scales];
        let gptq = part(Int4Layout::Gptq, tensors);
        gptq.check().expect("it is whole");
        assert_eq!((gptq.quant(5, 0), gptq.quant(5, 3)), (5, 3));
        assert_eq!((gptq.zero(0, 0), gptq.zero(7, 0)), (1, 16));
        assert_eq!(part(Int4Layout::GptqV2, tensors).zero(7, 0), 15);
        let awq = part(Int4Layout::Awq, tensors);
        assert_eq!((awq.quant(0, 6), awq.quant(2, 6), awq.quant(1, 6)), (6, 1, 4));
        assert_eq!((awq.zero(4, 0), awq.zero(7, 0)), (2, 15));
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_numbers() {
        let (qweight, qzeros, scales) = ([0; 32], [0; 4], [0; 16]);
        let good = part(Int4Layout::Gptq, [&qweight, &qzeros, &scales]);
        let refused = |part: Int4Part<'_>| part.check().expect_err("refused").to_string();
        assert!(refused(Int4Part { rows: 12, ..good }).contains("[12, 8]"));
        assert!(refused(Int4Part { group: 48, ..good }).contains("groups of 48"));
        assert!(refused(Int4Part { first_col: 4, ..good }).contains("cut the ranks' columns"));
        assert!(refused(Int4Part { first_col: 32, ..good }).contains("group 1 of 1"));
        assert!(refused(Int4Part { qweight: &[0; 31], ..good }).contains("31 bytes, wanted 32"));
        assert!(refused(Int4Part { qzeros: &[0; 8], ..good }).contains("8 bytes, wanted 4"));
        let groups: Vec<u8> = [0, 0, 0, -1, 0, 0, 0, 0i32].map(i32::to_le_bytes).concat();
        assert!(refused(Int4Part { column_groups: Some(&groups), ..good }).contains("of 1"));
        assert!(refused(Int4Part { column_groups: Some(&groups[4..]), ..good }).contains("g_idx"));
    }
}
