//! README's tour: every command is run as it stands there, and its output compared.

use std::{fs, path::Path, process::Command, time::Duration};

use serde_json::Value;
use tests::{Process, lockstep};

const DEADLINE: Duration = Duration::from_secs(300);

/// A command as the README shows it, and the lines that it shows below.
struct Step {
    command: String,
    expected: Vec<String>,
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ has a parent")
}

fn readme() -> String {
    fs::read_to_string(root().join("README.md")).expect("README.md")
}

fn tour(readme: &str) -> Vec<Step> {
    let (_, tour) = readme.split_once("\n## A tour\n").expect("a tour");
    let block = tour.split("```").nth(1).expect("a block of commands");
    let mut steps: Vec<Step> = Vec::new();
    let mut goes_on = false;
    for line in block.lines().skip(1) {
        match (line.strip_prefix("$ "), steps.last_mut()) {
            (Some(command), _) => {
                steps.push(Step { command: command.to_owned(), expected: Vec::new() });
            }
            (None, Some(step)) if goes_on => step.command += &format!("\n{line}"),
            (None, Some(step)) => step.expected.push(line.to_owned()),
            (None, None) => panic!("the tour begins with {line:?}, not with a command"),
        }
        goes_on = line.ends_with('\\');
    }
    steps
}

/// What differs from run to run becomes the same; progress that a terminal erases goes.
fn masked<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<String> {
    let progress = |line: &&str| !(line.contains(": ") && line.ends_with(" %)"));
    lines.filter(progress).map(mask).collect()
}

fn mask(line: &str) -> String {
    if let Ok(Value::Object(mut object)) = serde_json::from_str(line) {
        let id = object["id"].as_str().expect("an id").split('-').next().unwrap_or_default();
        object["id"] = format!("{id}-…").into();
        object["created"] = 0.into();
        return Value::Object(object).to_string();
    }
    if !line.contains(" tok/s") {
        return line.to_owned();
    }
    // Rates and seconds have a point, counts have none.
    let word = |word: &str| match word.contains('.') {
        true => word.chars().filter(|c| !c.is_ascii_digit()).collect(),
        false => word.to_owned(),
    };
    line.split(' ').map(word).collect::<Vec<_>>().join(" ")
}

#[test]
fn every_command_of_the_tour_prints_what_the_readme_shows() {
    let readme = readme();
    let up = Process::up(&["--tp", "2"]);
    let hidden = |line: &str| line.chars().filter(|c| !c.is_ascii_digit()).collect::<String>();
    let shown = readme.lines().find(|line| line.starts_with("ready http=")).expect("a ready line");
    assert_eq!(hidden(up.ready().trim_end()), hidden(shown), "the ready line");

    let curl = Command::new("curl").arg("--version").output().is_ok();
    let folder = lockstep().parent().expect("a folder").display().to_string();
    let path = format!("{folder}:{}", std::env::var("PATH").expect("a PATH"));
    let steps = tour(&readme);
    assert!(steps.len() >= 4, "{} commands", steps.len());
    for Step { command, expected } in steps {
        if command.starts_with("curl") && !curl {
            eprintln!("SKIPPED: {command}: curl is not installed");
            continue;
        }
        let here = command.replace("localhost:8000", up.address("http"));
        let script = format!("{{\n{here}\n}} 2>&1");
        let mut shell = Command::new("sh");
        shell.current_dir(root()).env("PATH", &path).env("LOCKSTEP_ROUTER", up.address("grpc"));
        let (status, output) = Process::run(shell.args(["-c", &script]), DEADLINE);
        assert!(status.success(), "{command}: {status}: {output}");
        let expected = masked(expected.iter().map(String::as_str));
        assert_eq!(masked(output.lines()), expected, "{command}");
    }
}
