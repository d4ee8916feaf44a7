//! Whether the workflows of CI use nothing that can change under them, and may do no more than they need.
//!
//! A tag of an action is moved with one push, by whoever has its repository; the commit that a workflow
//! names stays what it was when somebody read it.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

/// Where they are.
const DIRECTORY: &str = ".github/workflows";

/// Checks all workflows.
pub(crate) fn check(root: &Path) -> Result<()> {
    let directory = root.join(DIRECTORY);
    let mut problems = Vec::new();
    let mut count = 0;
    let entries = fs::read_dir(&directory).with_context(|| format!("cannot list {DIRECTORY}"))?;
    for entry in entries {
        let path = entry.with_context(|| format!("cannot list {DIRECTORY}"))?.path();
        let text =
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        problems.extend(problems_of(&text).into_iter().map(|problem| format!("{name}: {problem}")));
        count += 1;
    }
    if count == 0 {
        bail!("there is no workflow in {DIRECTORY}");
    }
    if !problems.is_empty() {
        bail!("in {DIRECTORY}:\n  {}", problems.join("\n  "));
    }
    eprintln!(
        "    {count} workflows: every action by its commit, least permissions, bounded in time"
    );
    Ok(())
}

/// What is wrong with a workflow of this text.
fn problems_of(text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().map(without_comment).collect();
    let mut problems = Vec::new();
    for (number, line) in (1..).zip(&lines) {
        for used in values_of(line, "uses") {
            if !is_pinned(used) {
                problems.push(format!(
                    "line {number}: {used:?} is to be named by a commit of 40 hexadecimal digits"
                ));
            }
        }
    }
    let count = |key: &str| lines.iter().map(|line| values_of(line, key).len()).sum::<usize>();
    if !lines.contains(&"permissions:") || count("permissions") > 1 {
        problems.push("its permissions are to be said once, for all jobs".to_owned());
    }
    if lines.iter().any(|line| values_of(line, "permissions") == ["write-all"])
        || lines.iter().any(|line| line.trim().ends_with(": write"))
    {
        problems.push("it may write, which no job needs".to_owned());
    }
    if count("timeout-minutes") < count("runs-on") {
        problems.push("each job is to have timeout-minutes".to_owned());
    }
    if count("concurrency") == 0 {
        problems.push("it is to say what becomes of the run before (concurrency)".to_owned());
    }
    problems
}

fn without_comment(line: &str) -> &str {
    let end = line.find(" #").unwrap_or(line.len());
    let line = &line[..end];
    if line.trim_start().starts_with('#') { "" } else { line.trim_end() }
}

/// The values that a line gives to a key, in whichever way YAML allows to write it on one line.
fn values_of<'a>(line: &'a str, key: &str) -> Vec<&'a str> {
    let quotes = ['"', '\''];
    line.match_indices(key)
        .filter(|(at, _)| {
            let before = line[..*at].chars().next_back();
            before.is_none_or(|before| " -{,\"'".contains(before))
        })
        .filter_map(|(at, _)| {
            let after = line[at + key.len()..].trim_start_matches(quotes).trim_start();
            Some(
                after
                    .strip_prefix(':')?
                    .trim_matches(|c: char| " {},".contains(c) || quotes.contains(&c)),
            )
        })
        .collect()
}

/// Whether it is `owner/name@commit`, with a path or without.
fn is_pinned(used: &str) -> bool {
    used.split_once('@').is_some_and(|(action, commit)| {
        action.contains('/')
            && commit.len() == 40
            && commit.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    fn workflow(uses: &str) -> String {
        format!(
            "on: push\npermissions:\n  contents: read\nconcurrency:\n  group: a\njobs:\n  a:\n    \
             runs-on: b\n    timeout-minutes: 1\n    steps:\n      - {uses}\n"
        )
    }

    #[test]
    fn an_action_is_named_by_its_commit() {
        for good in [
            format!("uses: a/b@{COMMIT}"),
            format!("uses: a/b/c@{COMMIT} # v1"),
            format!("{{ \"uses\": 'a/b@{COMMIT}' }}"),
            "run: echo uses nothing".to_owned(),
        ] {
            assert_eq!(problems_of(&workflow(&good)), [""; 0], "{good}");
        }
        for bad in ["uses: a/b@v7", "uses: a/b", "\"uses\" : a/b@main", "{name: x, uses: ./own}"] {
            let problems = problems_of(&workflow(bad));
            assert!(
                problems.len() == 1 && problems[0].starts_with("line 11: "),
                "{bad}: {problems:?}"
            );
        }
        assert_eq!(problems_of(&workflow(&format!("uses: a/b@{}", &COMMIT[1..]))).len(), 1);
    }

    #[test]
    fn the_committed_workflows_are_in_order() {
        check(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()).unwrap();
    }

    #[test]
    fn a_workflow_is_bounded_and_may_only_read() {
        let good = workflow("run: true");
        for (from, to) in [
            ("permissions:\n  contents: read\n", ""),
            ("contents: read", "contents: write"),
            ("permissions:\n  contents: read", "permissions: write-all"),
            ("    timeout-minutes: 1\n", ""),
            ("concurrency:\n  group: a\n", ""),
        ] {
            assert!(good.contains(from));
            assert!(!problems_of(&good.replace(from, to)).is_empty(), "{from} -> {to}");
        }
    }
}
