//! `--logits-out`: float32 `logits` [T, V] as a safetensors file, written as the rows come.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use anyhow::{Context, Result, bail};

pub struct LogitsFile {
    file: BufWriter<File>,
    /// Floats still to come.
    left: usize,
}

impl LogitsFile {
    /// For `rows` positions and `cols` ids.
    pub fn create(path: &Path, rows: usize, cols: usize) -> Result<Self> {
        let file = File::create(path)
            .with_context(|| format!("cannot write --logits-out {}", path.display()))?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        let end = rows * cols * size_of::<f32>();
        let tensor = serde_json::json!({
            "dtype": "F32", "shape": [rows, cols], "data_offsets": [0, end],
        });
        let mut header = serde_json::json!({ "logits": tensor }).to_string();
        // The data begins at a multiple of 8.
        header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        Ok(Self { file, left: rows * cols })
    }

    /// The next rows.
    pub fn write(&mut self, rows: &[f32]) -> Result<()> {
        let Some(left) = self.left.checked_sub(rows.len()) else {
            bail!("{} more logits came than were asked for", rows.len() - self.left);
        };
        self.left = left;
        for value in rows {
            self.file.write_all(&value.to_le_bytes())?;
        }
        Ok(())
    }

    /// Checks that everything came.
    pub fn finish(mut self) -> Result<()> {
        if self.left > 0 {
            bail!("{} logits did not come", self.left);
        }
        Ok(self.file.flush()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back_as_safetensors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.safetensors");
        let mut file = LogitsFile::create(&path, 2, 3).unwrap();
        file.write(&[1.0, 2.0, 3.0]).unwrap();
        assert!(file.write(&[0.0; 4]).is_err());
        file.write(&[4.0, 5.0, -6.5]).unwrap();
        file.finish().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let tensors = formats::safetensors::parse(&bytes).unwrap();
        assert_eq!(tensors.len(), 1);
        assert_eq!(tensors[0].name, "logits");
        assert_eq!(tensors[0].shape, [2, 3]);
        assert_eq!(bytes[bytes.len() - 4..], (-6.5f32).to_le_bytes());
        let short = LogitsFile::create(&path, 1, 1).unwrap();
        assert!(short.finish().is_err());
    }
}
