//! `docs/faults.md`: what faults cost, as measured.

use std::{fs, path::Path, time::Duration};

/// The rows of one test; with `UPDATE_DOCS=1` they replace its section of the document.
pub struct FaultTable {
    section: &'static str,
    head: String,
    rows: String,
}

impl FaultTable {
    /// Of streams that were under way.
    pub fn new(section: &'static str) -> Self {
        Self::with(section, &["fault", "streams", "longest silence"])
    }

    /// With columns of its own.
    pub fn with(section: &'static str, columns: &[&str]) -> Self {
        let rule = "|---".repeat(columns.len());
        let head = format!("| {} |\n{rule}|\n", columns.join(" | "));
        Self { section, head, rows: String::new() }
    }

    /// What was done to streams that were under way, and their longest silence.
    pub fn row(&mut self, fault: &str, longest: Duration) {
        self.cells(&[fault, "all complete and identical", &seconds(longest)]);
    }

    /// One row, a cell for each column.
    pub fn cells(&mut self, cells: &[&str]) {
        self.rows += &format!("| {} |\n", cells.join(" | "));
        println!("{}", cells.join(": "));
    }

    /// Writes the section, where that is asked for.
    pub fn finish(self) {
        if std::env::var_os("UPDATE_DOCS").is_none() {
            return;
        }
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/faults.md");
        let text = fs::read_to_string(&path).expect("docs/faults.md");
        let Self { section, head, rows } = self;
        let (begin, end) = (format!("<!-- {section} -->\n"), format!("<!-- end {section} -->"));
        let (before, rest) = text.split_once(&begin).expect("the section's begin");
        let (_, after) = rest.split_once(&end).expect("the section's end");
        fs::write(&path, format!("{before}{begin}{head}{rows}{end}{after}"))
            .expect("docs/faults.md");
    }
}

/// As tables say it.
pub fn seconds(duration: Duration) -> String {
    format!("{:.2} s", duration.as_secs_f64())
}
