//! `docs/faults.md`: what faults cost, as measured.

use std::{fs, path::Path, time::Duration};

/// The rows of one test; with `UPDATE_DOCS=1` they replace its section of the document.
pub struct FaultTable {
    section: &'static str,
    rows: String,
}

impl FaultTable {
    pub fn new(section: &'static str) -> Self {
        Self { section, rows: String::new() }
    }

    /// What was done to streams that were under way, and their longest silence.
    pub fn row(&mut self, fault: &str, longest: Duration) {
        let seconds = longest.as_secs_f64();
        self.rows += &format!("| {fault} | all complete and identical | {seconds:.2} s |\n");
        println!("{fault}: {seconds:.2} s");
    }

    /// Writes the section, where that is asked for.
    pub fn finish(self) {
        if std::env::var_os("UPDATE_DOCS").is_none() {
            return;
        }
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/faults.md");
        let text = fs::read_to_string(&path).expect("docs/faults.md");
        let (begin, end) =
            (format!("<!-- {} -->\n", self.section), format!("<!-- end {} -->", self.section));
        let (before, rest) = text.split_once(&begin).expect("the section's begin");
        let (_, after) = rest.split_once(&end).expect("the section's end");
        let head = "| fault | streams | longest silence |\n|---|---|---|\n";
        let text = format!("{before}{begin}{head}{}{end}{after}", self.rows);
        fs::write(&path, text).expect("docs/faults.md");
    }
}
