//! A virtual machine for one boot, and what is heard from it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::kernels::Kernel;
use crate::conformance;
use crate::host;
use crate::process;
use crate::test::count;
use crate::verifier::Status;

/// The processor emulator; there is no other architecture in [`super`].
pub(super) const EMULATOR: &str = "qemu-system-x86_64";
/// How init.sh begins a line that is for us.
const MARK: &str = "carnet-vm: ";
/// The step that shows what the verifier said.
const PROGRAMS: &str = "programs";
/// The step that prints the matrix; it is shown, as a refusal is.
const MATRIX: &str = conformance::SUITE.target;
/// The step that shows how an old kernel is refused, and the parameter that asks for it.
const REFUSAL: &str = "refusal";
/// Bits of `/proc/sys/kernel/tainted`: the kernel died somewhere (D), or warned (W).
const TAINT: u64 = 1 << 7 | 1 << 9;
/// The status with which timeout(1) says that it ended the command.
const TIMED_OUT: i32 = 124;

/// Who executes the machine's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accelerator {
    /// The processor itself.
    Kvm,
    /// qemu, some twenty times slower.
    Emulation,
}

impl Accelerator {
    /// Tries whether a machine can be made with the processor's help.
    pub(super) fn find() -> Self {
        if !Path::new("/dev/kvm").exists() {
            return Self::Emulation;
        }
        let mut machine = Self::Kvm.emulator(Duration::from_secs(20));
        // Made, not started, and ended by its own console.
        machine.args(["-S", "-monitor", "stdio"]);
        machine.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let ended = machine.spawn().and_then(|mut machine| {
            if let Some(mut console) = machine.stdin.take() {
                console.write_all(b"quit\n")?;
            }
            machine.wait()
        });
        if ended.is_ok_and(|status| status.success()) { Self::Kvm } else { Self::Emulation }
    }

    /// qemu with nothing but a processor, ended after `limit`.
    fn emulator(self, limit: Duration) -> Command {
        let mut command = Command::new("timeout");
        // In the foreground, an interrupt from the terminal reaches the emulator, too.
        command.args(["--foreground", "--kill-after=10", &limit.as_secs().to_string(), EMULATOR]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-cpu", "max"]);
        command.arg("-accel").arg(match self {
            Self::Kvm => "kvm",
            Self::Emulation => "tcg",
        });
        command
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "the processor's own (KVM)",
            Self::Emulation => "emulation, which is slow",
        })
    }
}

/// What a kernel is to make of Carnet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Expectation {
    /// It runs it, and all of its tests.
    #[default]
    Works,
    /// It is too old, and Carnet says so.
    Refuses,
}

impl Expectation {
    /// Of the kernel with this release.
    pub(super) fn of(release: &str) -> Self {
        if host::kernel(release).is_ok() { Self::Works } else { Self::Refuses }
    }

    /// The step of init.sh that shows it.
    fn step(self) -> &'static str {
        match self {
            Self::Works => "demo",
            Self::Refuses => REFUSAL,
        }
    }
}

/// What one boot is made of.
pub(super) struct Machine<'a> {
    pub(super) accelerator: Accelerator,
    pub(super) kernel: &'a Kernel,
    pub(super) expectation: Expectation,
    pub(super) initramfs: &'a Path,
    /// Where the logs go.
    pub(super) directory: &'a Path,
    /// It is ended after this time.
    pub(super) limit: Duration,
}

impl Machine<'_> {
    /// Boots, listens until the machine is off, and keeps what was heard in two logs.
    pub(super) fn boot(&self) -> Result<Boot> {
        let log = |of: &str| self.directory.join(format!("{}.{of}.log", self.kernel.release));
        let (output, messages) = (log("output"), log("kernel"));
        // Whatever kills a process of the kernel ends the machine.
        let mut parameters = String::from("console=ttyS1 oops=panic panic=-1 loglevel=5");
        if self.accelerator == Accelerator::Emulation {
            // Where others are busy, the emulated timer may be late: the kernel would take it for broken,
            // and panic before it has a console to say so.
            parameters += " no_timer_check";
        }
        if self.expectation == Expectation::Refuses {
            parameters += " carnet.refusal";
        }
        let processors = std::thread::available_parallelism().map_or(1, |n| n.get().min(4));
        let mut command = self.accelerator.emulator(self.limit);
        command
            .args(["-m", "3G", "-no-reboot", "-smp", &processors.to_string()])
            .arg("-kernel")
            .arg(&self.kernel.image)
            .arg("-initrd")
            .arg(self.initramfs)
            .args(["-append", &parameters])
            .args(["-serial", "stdio", "-serial"])
            .arg(prefixed("file:", &messages))
            .stdin(Stdio::null());
        let mut kept =
            File::create(&output).with_context(|| format!("cannot create {}", output.display()))?;
        eprintln!("    output: {}", output.display());
        let begun = Instant::now();
        let mut heard = Heard::default();
        let mut unwritten = None;
        let status = process::lines(&mut command, |line| {
            let line = line.trim_end_matches('\r');
            let elapsed = begun.elapsed().as_secs_f32();
            unwritten = writeln!(kept, "[{elapsed:7.1}] {line}").err().or(unwritten.take());
            heard.hear(line);
        })?;
        if let Some(error) = unwritten {
            return Err(error).with_context(|| format!("cannot write {}", output.display()));
        }
        let seconds = begun.elapsed().as_secs();
        let problems = heard.problems(self.expectation, status, self.limit);
        Ok(Boot {
            release: self.kernel.release.clone(),
            expectation: self.expectation,
            seconds,
            heard,
            problems,
            output,
            messages,
        })
    }
}

fn prefixed(prefix: &str, path: &Path) -> std::ffi::OsString {
    let mut word = std::ffi::OsString::from(prefix);
    word.push(path);
    word
}

/// What came of one boot.
#[derive(Debug)]
pub(super) struct Boot {
    pub(super) release: String,
    pub(super) expectation: Expectation,
    pub(super) seconds: u64,
    pub(super) heard: Heard,
    /// What went wrong beside tests that failed.
    pub(super) problems: Vec<String>,
    output: PathBuf,
    messages: PathBuf,
}

impl Boot {
    /// One in which these lines were heard and the emulator ended well.
    #[cfg(test)]
    pub(super) fn heard_of(release: &str, lines: &[&str]) -> Self {
        let mut heard = Heard::default();
        lines.iter().for_each(|line| heard.hear(line));
        let expectation = Expectation::of(release);
        let problems = heard.problems(expectation, ExitStatus::default(), Duration::ZERO);
        let log = PathBuf::new;
        let release = release.to_owned();
        Self { release, expectation, seconds: 0, heard, problems, output: log(), messages: log() }
    }

    /// Whether the step that shows what is expected ended well.
    pub(super) fn is_as_expected(&self) -> bool {
        self.heard.is_well(self.expectation.step())
    }

    /// Prints what the machine said.
    pub(super) fn show_logs(&self) -> Result<()> {
        for log in [&self.messages, &self.output] {
            let text = fs::read(log).with_context(|| format!("cannot read {}", log.display()))?;
            println!("\n--- {}\n{}", log.display(), String::from_utf8_lossy(&text).trim_end());
        }
        Ok(())
    }
}

/// What was heard from a machine.
#[derive(Debug, Default)]
pub(super) struct Heard {
    /// The step that has begun and not ended.
    step: Option<String>,
    /// The status with which each step ended.
    ended: BTreeMap<String, i32>,
    pub(super) passed: u64,
    pub(super) failed: u64,
    pub(super) skipped: u64,
    /// The names of the tests that failed.
    pub(super) failures: Vec<String>,
    /// The instructions of each program that the verifier looked at.
    pub(super) verified: BTreeMap<String, u32>,
    /// What the kernel says of itself at the end.
    tainted: Option<u64>,
}

impl Heard {
    /// Takes a line.
    fn hear(&mut self, line: &str) {
        if let Some(mark) = line.strip_prefix(MARK) {
            match mark.split(' ').collect::<Vec<_>>()[..] {
                ["kernel", release] => eprintln!("    Linux {release} is up"),
                ["begin", step] => {
                    eprintln!("    {step}");
                    self.step = Some(step.to_owned());
                }
                ["end", step, status] => {
                    self.step = None;
                    if let Ok(status) = status.parse() {
                        self.ended.insert(step.to_owned(), status);
                    }
                }
                ["tainted", value] => self.tainted = value.parse().ok(),
                _ => {}
            }
            return;
        }
        if self.step.as_deref() == Some(PROGRAMS) {
            if let Ok(status) = serde_json::from_str::<Status>(line) {
                self.verified.extend(status.verified());
            }
            return;
        }
        if matches!(self.step.as_deref(), Some(MATRIX | REFUSAL)) {
            println!("{line}");
        }
        if let Some(result) = line.strip_prefix("test result: ") {
            self.passed += count(result, "passed");
            self.failed += count(result, "failed");
            self.skipped += count(result, "ignored");
        } else if let Some(test) = line.strip_prefix("test ")
            && let Some(test) = test.strip_suffix(" ... FAILED")
        {
            self.failures.push(test.to_owned());
        }
    }

    /// Whether the step ended well.
    pub(super) fn is_well(&self, step: &str) -> bool {
        self.ended.get(step) == Some(&0)
    }

    /// What went wrong beside tests that failed, the emulator having ended like this.
    fn problems(
        &self,
        expectation: Expectation,
        status: ExitStatus,
        limit: Duration,
    ) -> Vec<String> {
        let mut problems: Vec<String> = self
            .ended
            .iter()
            // Of a suite with failures, they say more.
            .filter(|(_, status)| **status != 0 && !(**status == 101 && self.failed > 0))
            .map(|(step, status)| format!("{step} ended with {status}"))
            .collect();
        let during = self.step.as_deref().map_or("no step of ours", |step| step);
        if status.code() == Some(TIMED_OUT) {
            let minutes = limit.as_secs() / 60;
            problems.push(format!("not done after {minutes} minutes, during {during}"));
        } else if !status.success() {
            problems.push(format!("the emulator ended badly ({status}), during {during}"));
        } else {
            match self.tainted {
                None => problems.push(format!("the machine ended early, during {during}")),
                Some(taint) if taint & TAINT != 0 => {
                    problems.push(format!("the kernel warned (it is tainted: {taint})"));
                }
                Some(_) if expectation == Expectation::Works && self.verified.is_empty() => {
                    problems.push("the engine's programs are not listed".to_owned());
                }
                Some(_) if !self.ended.contains_key(expectation.step()) => {
                    problems.push(format!("it has not come to {}", expectation.step()));
                }
                Some(_) => {}
            }
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(120);
    const WELL: [&str; 12] = [
        "carnet-vm: kernel 6.1.0-1-amd64",
        "carnet-vm: begin demo",
        "carnet-vm: end demo 0",
        "carnet-vm: begin programs",
        r#"{"instance":"a","programs":[{"name":"connect4","id":1,"verified_instructions":7}]}"#,
        "carnet-vm: end programs 0",
        "carnet-vm: begin e2e",
        "test one ... ok",
        "test two ... ignored",
        "test result: ok. 1 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out",
        "carnet-vm: end e2e 0",
        "carnet-vm: tainted 4096",
    ];

    fn problems(lines: &[&str], status: i32) -> (Heard, Vec<String>) {
        let mut heard = Heard::default();
        lines.iter().for_each(|line| heard.hear(line));
        let ended = ExitStatus::from_raw(status << 8);
        let problems = heard.problems(Expectation::Works, ended, LIMIT);
        (heard, problems)
    }

    #[test]
    fn a_kernel_that_is_too_old_has_to_be_refused() {
        assert_eq!(Expectation::of("5.10.0-32-amd64"), Expectation::Refuses);
        assert_eq!(Expectation::of("6.1.0-56-amd64"), Expectation::Works);
        let boot = |end| Boot::heard_of("5.10.0-32-amd64", &[end, "carnet-vm: tainted 0"]);
        assert!(boot("carnet-vm: end refusal 0").problems.is_empty());
        assert_eq!(boot("carnet-vm: end refusal 1").problems, ["refusal ended with 1"]);
        assert_eq!(boot("").problems, ["it has not come to refusal"]);
    }

    #[test]
    fn a_boot_in_which_all_is_well_has_no_problem() {
        let (heard, problems) = problems(&WELL, 0);
        assert_eq!(problems, [""; 0]);
        assert!(heard.is_well("demo"));
        assert_eq!((heard.passed, heard.failed, heard.skipped), (1, 0, 1));
        assert_eq!(heard.verified["connect4"], 7);
    }

    #[test]
    fn a_kernel_that_panics_or_warns_or_hangs_is_a_problem() {
        let (_, early) = problems(&WELL[..8], 0);
        assert_eq!(early, ["the machine ended early, during e2e"]);
        let (_, hung) = problems(&WELL[..8], TIMED_OUT);
        assert_eq!(hung, ["not done after 2 minutes, during e2e"]);
        let warned = [&WELL[..11], &["carnet-vm: tainted 512"]].concat();
        assert_eq!(problems(&warned, 0).1, ["the kernel warned (it is tainted: 512)"]);
    }

    #[test]
    fn a_step_that_fails_is_a_problem_unless_its_tests_say_why() {
        let without_demo = [&["carnet-vm: end demo 1"], &WELL[3..]].concat();
        let (heard, found) = problems(&without_demo, 0);
        assert_eq!(found, ["demo ended with 1"]);
        assert!(!heard.is_well("demo"));

        let result = "test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured";
        let failing = ["test one ... FAILED", result, "carnet-vm: end e2e 101", WELL[11]];
        let (heard, found) = problems(&[&WELL[..7], &failing].concat(), 0);
        assert_eq!(found, [""; 0]);
        assert_eq!((heard.failed, heard.failures), (1, vec!["one".to_owned()]));
    }
}
