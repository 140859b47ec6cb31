//! SHA-256 of files.

use std::{
    fs::{self, File},
    io::Read,
    path::Path,
};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

/// Lower-case hexadecimal digits of a file's SHA-256.
pub fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            let digits = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
            return Ok(digits);
        }
        hasher.update(&buffer[..read]);
    }
}

/// Throws a file away that has another size, or another checksum where one is known.
///
/// # Errors
/// The file differs.
pub fn verify(path: &Path, size: u64, sum: Option<&str>) -> Result<()> {
    let found = fs::metadata(path).with_context(|| format!("no file {}", path.display()))?.len();
    if found != size {
        fs::remove_file(path)?;
        bail!("{}: {found} bytes came, {size} were announced; try again", path.display());
    }
    let Some(sum) = sum else { return Ok(()) };
    let found = sha256(path)?;
    if found != sum {
        fs::remove_file(path)?;
        bail!("{}: SHA-256 is {found}, announced was {sum}; try again", path.display());
    }
    Ok(())
}
