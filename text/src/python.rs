//! Python's spellings and string methods, which chat templates were written for.

pub mod json;
pub mod methods;
pub mod values;

/// A float as `repr` writes it: the exponent has a sign and at least two digits.
fn float_text(number: f64) -> String {
    let text = format!("{number:?}");
    let Some((mantissa, exponent)) = text.split_once('e') else { return text };
    let (sign, digits) = match exponent.strip_prefix('-') {
        Some(digits) => ('-', digits),
        None => ('+', exponent),
    };
    format!("{mantissa}e{sign}{digits:0>2}")
}

/// What `str.isspace` takes for whitespace: Unicode's, and four control characters.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}
