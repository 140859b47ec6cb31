#![forbid(unsafe_code)]
//! `requantise FORMAT MODEL OUT`: writes a checkpoint anew with the matrices of its layers in
//! another format, so that one model can be measured in all of them.
//!
//! Values are rounded to the nearest by the rules of the format, without calibration. Every format
//! but `f32` gets its tables in F16 and its vectors in F32, whatever the input had: files made of
//! one model differ in the layers' matrices alone. `f32` holds what the input's numbers stand for,
//! so that of a quantised input it is the reference.
//!
//! The whole output is held in memory. Refused: original Qwen, mixtures of experts and
//! stretched positions, and as GGUF files whose rows lie in another order (Llama).

mod folder;
mod gguf;
mod quantise;
mod source;

use clap::{Parser, ValueEnum};
use model::Checkpoint;
use std::{fs, path::PathBuf, process::ExitCode};

use quantise::Encoded;
use source::{Role, Source, Tensor};

/// Any failure, told once.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

#[derive(Parser)]
struct Cli {
    /// What the layers' matrices become; the q formats make a GGUF file, the others a folder
    format: Format,
    /// A folder or file that the product opens
    model: PathBuf,
    /// A folder that is new or empty, or a new file
    out: PathBuf,
    /// Keeps this many rows of the tables: a model whose time is its layers', for timing alone
    #[arg(long)]
    vocab: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    F32,
    /// AutoGPTQ's layout, groups of 128 with zero points
    GptqInt4,
    /// AutoAWQ's GEMM layout, groups of 128 with zero points
    AwqInt4,
    /// e4m3 with a scale for 128 by 128
    Fp8Block128,
    /// e4m3 with a scale for each row, as compressed-tensors
    Fp8Row,
    #[value(name = "q4_0")]
    Q4_0,
    #[value(name = "q4_1")]
    Q4_1,
    #[value(name = "q8_0")]
    Q8_0,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("requantise: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    if fs::read_dir(&cli.out).map_or(cli.out.exists(), |mut found| found.next().is_some()) {
        return Err(format!("{} is there already", cli.out.display()).into());
    }
    let source = Source::open(&cli.model, cli.vocab)?;
    let mut tensors = Vec::new();
    source.read(&mut |tensor| {
        tensors.push(encode(cli.format, tensor)?);
        Ok(())
    })?;
    match cli.format {
        Format::Q4_0 | Format::Q4_1 | Format::Q8_0 => gguf::write(&cli.out, &source, &tensors)?,
        format => folder::write(&cli.out, &source, format, &tensors)?,
    }
    // What the product refuses was not worth writing.
    Checkpoint::open(&cli.out)?;
    Ok(())
}

/// One tensor of the source in the output's numbers.
fn encode(format: Format, tensor: Tensor) -> Result<(Tensor, Vec<Encoded>)> {
    let encoded = match (tensor.role, format) {
        (Role::Vector, _) | (_, Format::F32) => vec![quantise::f32s(&tensor)],
        (Role::Table, _) => vec![quantise::f16s(&tensor)],
        (Role::Matrix, Format::GptqInt4) => quantise::gptq(&tensor)?,
        (Role::Matrix, Format::AwqInt4) => quantise::awq(&tensor)?,
        (Role::Matrix, Format::Fp8Block128) => quantise::fp8_blocks(&tensor),
        (Role::Matrix, Format::Fp8Row) => quantise::fp8_rows(&tensor),
        (Role::Matrix, Format::Q4_0) => vec![quantise::blocks(&tensor, "Q4_0", quantise::q4_0)?],
        (Role::Matrix, Format::Q4_1) => vec![quantise::blocks(&tensor, "Q4_1", quantise::q4_1)?],
        (Role::Matrix, Format::Q8_0) => vec![quantise::blocks(&tensor, "Q8_0", quantise::q8_0)?],
    };
    Ok((Tensor { values: Vec::new(), ..tensor }, encoded))
}
