//! Integers out of the words that hold them, by row.

use std::ops::Range;

use formats::Tensors;
use kernels::Grouped;

use super::{Packing, WORD, word_cols, words};
use crate::{ModelError, weights::module::Module};

/// The words of a module's integers.
pub(super) struct Words<'a> {
    pub tensors: &'a Tensors,
    pub name: String,
    pub module: &'a Module,
    pub packing: Packing,
}

/// Bytes of a row that are put at once: as many as the processor fetches.
const LINE_BYTES: usize = 64;
/// Outputs in one of AWQ's words.
const OUTPUTS: usize = 8;

impl Words<'_> {
    /// Rows `first` and on, as many as fill `to`, of some columns: the lowest bits first.
    pub fn put(&self, first: usize, cols: &Range<usize>, to: &mut [u8]) -> Result<(), ModelError> {
        let row_bytes = Grouped::row_bytes(self.packing.bits(), cols.len());
        if to.is_empty() {
            return Ok(());
        }
        let rows = first..first + to.len() / row_bytes;
        let line = LINE_BYTES / (WORD / 8) * self.packing.each();
        for start in (cols.start..cols.end).step_by(line) {
            let here = start..(start + line).min(cols.end);
            let at = Grouped::row_bytes(self.packing.bits(), start - cols.start);
            let lines = to.chunks_exact_mut(row_bytes).map(|row| &mut row[at..]);
            match self.packing {
                Packing::Gptq { .. } => self.along_inputs(&rows, here, lines)?,
                Packing::Awq { .. } => self.along_outputs(&rows, here, lines)?,
            }
        }
        Ok(())
    }

    /// Of words that hold inputs of one output each, as a row has them.
    fn along_inputs<'t>(
        &self,
        rows: &Range<usize>,
        cols: Range<usize>,
        lines: impl Iterator<Item = &'t mut [u8]>,
    ) -> Result<(), ModelError> {
        let each = self.packing.each();
        let words =
            self.table((cols.start / each)..cols.end.div_ceil(each), self.module.rows, rows)?;
        let bytes = Grouped::row_bytes(self.packing.bits(), cols.len());
        for (row, line) in lines.enumerate() {
            let mut words =
                words.iter().skip(row).step_by(rows.len()).map(|word| word.to_le_bytes());
            let (whole, rest) = line[..bytes].as_chunks_mut();
            whole.iter_mut().zip(&mut words).for_each(|(to, word)| *to = word);
            // Of fewer inputs than a word has room for.
            if let Some(last) = words.next() {
                rest.copy_from_slice(&last[..rest.len()]);
            }
        }
        Ok(())
    }

    /// Of words that hold outputs of one input each.
    fn along_outputs<'t>(
        &self,
        rows: &Range<usize>,
        cols: Range<usize>,
        lines: impl Iterator<Item = &'t mut [u8]>,
    ) -> Result<(), ModelError> {
        let each = self.packing.each();
        let held = rows.start / each..rows.end.div_ceil(each);
        let words = self.table(cols.clone(), word_cols(self.module, self.packing), &held)?;
        let at = |k: usize, word: usize| words.get(k * held.len() + word).copied().unwrap_or(0);
        let mut lines = rows.clone().zip(lines).peekable();
        for word in held.clone() {
            // Of every output that the words hold, two inputs to a byte.
            let mut outputs = [[0; LINE_BYTES]; OUTPUTS];
            for pair in 0..cols.len().div_ceil(2) {
                let [a, b] = [2 * pair, 2 * pair + 1].map(|k| at(k, word - held.start));
                let even = a & 0x0f0f_0f0f | (b & 0x0f0f_0f0f) << 4;
                let odd = a >> 4 & 0x0f0f_0f0f | b & 0xf0f0_f0f0;
                for (n, output) in outputs.iter_mut().enumerate() {
                    let nibble = self.packing.shift(n) / 4;
                    output[pair] = ([even, odd][nibble % 2] >> (nibble / 2 * 8)) as u8;
                }
            }
            while let Some((row, line)) = lines.next_if(|(row, _)| row / each == word) {
                let bytes = cols.len().div_ceil(2);
                line[..bytes].copy_from_slice(&outputs[row % each][..bytes]);
            }
        }
        Ok(())
    }

    /// Some columns of rows of `width` words each.
    fn table(
        &self,
        rows: Range<usize>,
        width: usize,
        cols: &Range<usize>,
    ) -> Result<Vec<u32>, ModelError> {
        if cols.len() == width {
            return words(self.tensors, &self.name, rows.start * width, rows.len() * width);
        }
        let mut all = Vec::with_capacity(rows.len() * cols.len());
        for row in rows {
            all.extend(words(self.tensors, &self.name, row * width + cols.start, cols.len())?);
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use formats::Layout;
    use serde_json::json;

    const PACKINGS: [Packing; 3] = [
        Packing::Gptq { bits: 4, group: None, zeros_as_stored: false },
        Packing::Gptq { bits: 8, group: None, zeros_as_stored: false },
        Packing::Awq { group: None },
    ];

    fn integer(packing: Packing, row: usize, col: usize) -> u8 {
        ((row * 613 + col * 104_729) % 65_521 % (1 << packing.bits())) as u8
    }

    /// The words as the methods' own tools pack them.
    fn stored(packing: Packing, rows: usize, cols: usize) -> (Vec<usize>, Vec<u32>) {
        let (each, bits) = (WORD / packing.bits(), packing.bits());
        let packed = |of: &dyn Fn(usize) -> u8| -> u32 {
            (0..each).map(|at| u32::from(of(at)) << (at * bits)).fold(0, |word, it| word | it)
        };
        match packing {
            Packing::Gptq { .. } => {
                let word = |at: usize| {
                    let (first, row) = (at / rows * each, at % rows);
                    packed(&|i| match first + i < cols {
                        true => integer(packing, row, first + i),
                        false => 0,
                    })
                };
                let shape = vec![cols.div_ceil(each), rows];
                (shape, (0..cols.div_ceil(each) * rows).map(word).collect())
            }
            Packing::Awq { .. } => {
                const ORDER: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
                let width = rows.div_ceil(each);
                let word = |at: usize| {
                    let (col, first) = (at / width, at % width * each);
                    packed(&|i| integer(packing, first + ORDER[i], col))
                };
                (vec![cols, width], (0..cols * width).map(word).collect())
            }
        }
    }

    #[test]
    fn integers_of_every_cut_lie_by_row() {
        for (packing, cols) in PACKINGS.into_iter().flat_map(|p| [(p, 400), (p, 140), (p, 24)]) {
            let rows = 40;
            let (shape, words) = stored(packing, rows, cols);
            let offsets = [0, words.len() * 4];
            let tensor = json!({ "dtype": "I32", "shape": shape, "data_offsets": offsets });
            let header = json!({ "m.qweight": tensor }).to_string();
            let mut file = (header.len() as u64).to_le_bytes().to_vec();
            file.extend(header.bytes());
            file.extend(words.iter().flat_map(|word| word.to_le_bytes()));
            let folder = tempfile::tempdir().expect("a folder");
            let path = folder.path().join("m.safetensors");
            std::fs::write(&path, file).expect("a file");
            let layout = Layout::Safetensors {
                folder: folder.path().into(),
                files: vec![path],
                index: None,
            };
            let (tensors, _) = Tensors::open(&layout).expect("one tensor");
            let module = Module::new("m".into(), (rows, cols));
            let name = module.tensor("qweight");
            let read = Words { tensors: &tensors, name, module: &module, packing };
            let ranges = [0..cols, 8..cols, 8..cols - 3, 16..17];
            for (cut, cols) in [0..rows, 8..16, 3..29]
                .into_iter()
                .flat_map(|rows| ranges.clone().map(|cols| (rows.clone(), cols)))
            {
                let row_bytes = Grouped::row_bytes(packing.bits(), cols.len());
                let mut got = vec![0; cut.len() * row_bytes];
                read.put(cut.start, &cols, &mut got).expect("integers");
                for (row, got) in cut.clone().zip(got.chunks_exact(row_bytes)) {
                    let wanted: Vec<u8> =
                        cols.clone().map(|col| integer(packing, row, col)).collect();
                    let mut wanted = Grouped::packed(packing.bits(), cols.len(), &wanted);
                    let mut got = got.to_vec();
                    if cols.len() * packing.bits() % 8 != 0 {
                        // Nobody looks at what is behind the last.
                        for row in [&mut got, &mut wanted] {
                            *row.last_mut().expect("some") &= 15;
                        }
                    }
                    assert_eq!(got, wanted, "{packing:?}, row {row} of {cut:?}, {cols:?}");
                }
            }
        }
    }
}
