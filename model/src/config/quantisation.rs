//! `quantization_config`: how the matrices of a Hugging Face checkpoint are stored.

use serde_json::json;

use super::Fields;
use crate::ModelError;

/// What the configuration says of quantised matrices; which these are, the tensors tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Quantisation {
    None,
    /// GPTQ: integers along K in words.
    Gptq {
        /// 4 or 8.
        bits: usize,
        /// Columns with one scale; all of them where `None`.
        group: Option<usize>,
        /// Zero points are stored as they are; else as one less.
        zeros_as_stored: bool,
    },
    /// AWQ's GEMM form: integers of 4 bits along N in words.
    Awq {
        group: Option<usize>,
    },
    /// e4m3 with a scale for each block of rows and columns.
    Fp8Blocks {
        rows: usize,
        cols: usize,
    },
    /// e4m3 with a scale for each row or for the matrix.
    Fp8,
}

/// What to do about a method that is not run.
const REMEDY: &str =
    "use the GPTQ, AWQ, FP8 or unquantised checkpoint of the model, or a GGUF file";

impl Quantisation {
    /// # Errors
    /// `Unsupported` names the method or setting that is not run; `Checkpoint` what is missing or
    /// invalid.
    pub fn from_json(text: &[u8]) -> Result<Self, ModelError> {
        let fields = Fields::parse(text)?;
        let found = match fields.object("quantization_config")? {
            Some(found) => Some(found),
            None => fields.object("compression_config")?,
        };
        let Some(config) = found else { return Ok(Self::None) };
        let method = config.text(&["quant_method"])?;
        match method.as_deref() {
            Some("gptq") => Self::gptq(&config),
            Some("awq") => Self::awq(&config),
            Some("fp8") => Self::fp8(&config),
            Some("compressed-tensors") => Self::compressed_tensors(&config),
            other => Err(ModelError::Unsupported(format!(
                "weights quantised by {}; {REMEDY}",
                other.unwrap_or("an unnamed method")
            ))),
        }
    }

    fn gptq(config: &Fields) -> Result<Self, ModelError> {
        config.require("is_marlin_format", &json!(false))?;
        let bits = config.size(&["bits", "w_bit"])?;
        if !matches!(bits, 4 | 8) {
            return Err(ModelError::Unsupported(format!("GPTQ of {bits} bits; {REMEDY}")));
        }
        let format = config.text(&["checkpoint_format"])?;
        let zeros_as_stored = match format.as_deref() {
            None | Some("gptq") => false,
            Some("gptq_v2") => true,
            Some(other) => {
                return Err(ModelError::Unsupported(format!(
                    "GPTQ in checkpoint_format {other}; {REMEDY}"
                )));
            }
        };
        Ok(Self::Gptq { bits, group: config.group()?, zeros_as_stored })
    }

    fn awq(config: &Fields) -> Result<Self, ModelError> {
        let bits = config.size(&["bits", "w_bit"])?;
        let version = config.text(&["version"])?.unwrap_or_else(|| "gemm".into());
        let zeros = config.flag("zero_point", true)?;
        if bits != 4 || !version.eq_ignore_ascii_case("gemm") || !zeros {
            return Err(ModelError::Unsupported(format!(
                "AWQ of {bits} bits in version {version}, zero_point {zeros}; only gemm of 4 bits \
                 with zero points is run: {REMEDY}"
            )));
        }
        Ok(Self::Awq { group: config.group()? })
    }

    fn fp8(config: &Fields) -> Result<Self, ModelError> {
        config.require("fmt", &json!("e4m3"))?;
        match config.sizes("weight_block_size")?.as_deref() {
            None => Ok(Self::Fp8),
            Some(&[rows, cols]) if rows > 0 && cols > 0 => Ok(Self::Fp8Blocks { rows, cols }),
            Some(other) => Err(ModelError::Checkpoint(format!(
                "config.json: weight_block_size is {other:?}, not two positive sizes"
            ))),
        }
    }

    fn compressed_tensors(config: &Fields) -> Result<Self, ModelError> {
        let format = config.text(&["format"])?.unwrap_or_default();
        if format != "float-quantized" {
            return Err(ModelError::Unsupported(format!(
                "compressed-tensors in format {format:?}; only float-quantized is run: {REMEDY}"
            )));
        }
        let groups = config.objects("config_groups")?;
        let weights = groups.iter().map(|group| group.object("weights"));
        let weights: Vec<Fields> =
            weights.filter_map(Result::transpose).collect::<Result<_, _>>()?;
        let [weights] = &weights[..] else {
            return Err(ModelError::Unsupported(format!(
                "compressed-tensors of {} kinds of weights; {REMEDY}",
                weights.len()
            )));
        };
        weights.require("num_bits", &json!(8))?;
        weights.require("type", &json!("float"))?;
        match weights.text(&["strategy"])?.as_deref() {
            Some("channel" | "tensor") => Ok(Self::Fp8),
            Some("block") => match weights.sizes("block_structure")?.as_deref() {
                Some(&[rows, cols]) if rows > 0 && cols > 0 => Ok(Self::Fp8Blocks { rows, cols }),
                other => Err(ModelError::Checkpoint(format!(
                    "config.json: block_structure is {other:?}, not two positive sizes"
                ))),
            },
            other => Err(ModelError::Unsupported(format!(
                "fp8 with scales by {}; {REMEDY}",
                other.unwrap_or("an unnamed strategy")
            ))),
        }
    }
}

impl Fields {
    /// `group_size`, where −1 stands for all columns.
    fn group(&self) -> Result<Option<usize>, ModelError> {
        if self.number("group_size")?.or(self.number("q_group_size")?) == Some(-1.0) {
            return Ok(None);
        }
        let group = self.size(&["group_size", "q_group_size"])?;
        match group {
            0 => Err(ModelError::Checkpoint("config.json: group_size is 0".into())),
            _ => Ok(Some(group)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(config: serde_json::Value) -> Result<Quantisation, ModelError> {
        Quantisation::from_json(json!({ "quantization_config": config }).to_string().as_bytes())
    }

    #[test]
    fn published_forms_are_told_apart() {
        assert_eq!(Quantisation::from_json(b"{}").unwrap(), Quantisation::None);
        let gptq = read(json!({"quant_method": "gptq", "bits": 4, "group_size": 128})).unwrap();
        let wanted = Quantisation::Gptq { bits: 4, group: Some(128), zeros_as_stored: false };
        assert_eq!(gptq, wanted);
        let gptq = json!({"quant_method": "gptq", "bits": 8, "group_size": -1,
            "checkpoint_format": "gptq_v2"});
        let wanted = Quantisation::Gptq { bits: 8, group: None, zeros_as_stored: true };
        assert_eq!(read(gptq).unwrap(), wanted);
        let awq = json!({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "GEMM"});
        assert_eq!(read(awq).unwrap(), Quantisation::Awq { group: Some(128) });
        let fp8 = json!({"quant_method": "fp8", "weight_block_size": [128, 64]});
        assert_eq!(read(fp8).unwrap(), Quantisation::Fp8Blocks { rows: 128, cols: 64 });
        assert_eq!(read(json!({"quant_method": "fp8"})).unwrap(), Quantisation::Fp8);
    }

    #[test]
    fn what_is_not_run_is_named_with_what_is() {
        for (config, named) in [
            (json!({"quant_method": "bitsandbytes"}), "bitsandbytes"),
            (json!({"quant_method": "hqq"}), "hqq"),
            (json!({"bits": 4}), "an unnamed method"),
            (json!({"quant_method": "gptq", "bits": 3, "group_size": 128}), "3 bits"),
            (
                json!({"quant_method": "gptq", "bits": 4, "group_size": 128,
                    "checkpoint_format": "marlin"}),
                "marlin",
            ),
            (
                json!({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}),
                "gemv",
            ),
            (json!({"quant_method": "compressed-tensors", "format": "pack-quantized"}), "pack-"),
            (json!({"quant_method": "fp8", "fmt": "e5m2"}), "e5m2"),
        ] {
            let error = read(config).unwrap_err();
            assert!(matches!(error, ModelError::Unsupported(_)), "{error}");
            assert!(error.to_string().contains(named), "{error}");
        }
        let config = json!({"quant_method": "gptq", "bits": 4, "group_size": 0});
        assert!(matches!(read(config).unwrap_err(), ModelError::Checkpoint(_)));
    }
}
