//! `WSAIoctl` and `WSPIoctl`: which argument is looked at when, and what is done at once, what
//! later.
//!
//! The order (contract W13..W15, W36, X12): is the library initialised, is it a socket, can the
//! count of returned bytes be written; for an overlapped call the overlapped structure and the
//! routine; then the code; then the socket's state; then the buffers; then the other values.

use crate::contract::{Control, Failure, control, wsa};
use crate::control::{Output, Request, check_state, perform};
use crate::hooks;
use crate::memory::{CallerPtr, Fault, Overlapped};
use crate::operation::{Notification, Outcome, Work, complete_at_once};
use crate::process::process;
use crate::sockets::Socket;
use crate::sys;
use crate::thread::{self, CompletionRoutine, Queue};
use crate::wait::blocking_call;
use carnet_core::abi;
use std::sync::Arc;

/// The arguments that both entry points have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    pub(crate) socket: usize,
    pub(crate) code: u32,
    pub(crate) input: CallerPtr,
    pub(crate) input_length: u32,
    pub(crate) output: CallerPtr,
    pub(crate) output_length: u32,
    pub(crate) returned: CallerPtr,
    pub(crate) overlapped: CallerPtr,
    pub(crate) routine: Option<CompletionRoutine>,
}

/// In which thread a routine is to run.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    /// The calling one.
    Caller,
    /// The one that this `WSATHREADID` names; null: the calling one (contract S23).
    Named(CallerPtr),
}

/// Carries out a call: 0, or the Winsock error, `WSA_IO_PENDING` included.
pub(crate) fn ioctl(call: &Call, target: Target) -> Result<(), i32> {
    if !process().is_started() {
        return Err(wsa::NOTINITIALISED);
    }
    let socket = process().sockets.find(call.socket)?;
    if call.returned.check_writable(4).is_err() {
        return Err(wsa::EFAULT);
    }
    if socket.attributes.overlapped && !call.overlapped.is_null() {
        overlapped(call, socket, target)
    } else {
        synchronous(call, socket)
    }
}

/// What a code asks for here: without `SIO_FLUSH` if Microsoft's own provider is to be the model
/// (contract X2, W16..W18).
fn control_of(code: u32) -> Control {
    match control(code) {
        Control::Flush if process().strict_msafd => Control::Unknown,
        control => control,
    }
}

/// Does not return before there is a result (contract S20, W2).
fn synchronous(call: &Call, socket: Socket) -> Result<(), i32> {
    let control = control_of(call.code);
    let report = |failure: Failure| {
        // The error counts, whatever has become of the memory that was checked before.
        let _ = call.returned.write_u32(failure.returned());
        failure.code()
    };
    let request = request(call, socket, control).map_err(report)?;
    let _blocking = if is_of_redirection(control) {
        // An overlapped structure makes a non-blocking call on a socket without the attribute wait
        // (contract W2).
        let may_block =
            || !call.overlapped.is_null() || !sys::is_nonblocking(socket.fd).unwrap_or_default();
        Some(blocking_call(hooks::delay(), may_block).inspect_err(|_| {
            let _ = call.returned.write_u32(0);
        })?)
    } else {
        None
    };
    let answer = perform(socket.fd, &request).map_err(report)?;
    let bytes = answer.store().map_err(|Fault| report(Failure::Fault))?;
    call.returned.write_u32(bytes).map_err(|Fault| wsa::EFAULT)
}

/// Returns at once (contract S13..S19).
fn overlapped(call: &Call, socket: Socket, target: Target) -> Result<(), i32> {
    let overlapped = Overlapped(call.overlapped);
    let notification = notification(overlapped, call.routine, target)?;
    let control = control_of(call.code);
    // What is wrong with the arguments is said at once, and there is no completion (W5, W23, W30).
    let request = request(call, socket, control).map_err(Failure::code)?;
    let pends = match control {
        // Like codes that Windows hands to the kernel (W17, W27, W29).
        Control::QueryRecords | Control::QueryContext | Control::Unknown => true,
        // Like the codes that set something (W20).
        Control::SetRecords => !hooks::delay().is_zero(),
        _ => false,
    };
    if pends {
        let pending = &process().pending;
        pending
            .begin(socket, overlapped, notification, Work::Control(request))
            .map_err(Failure::code)?;
        return Err(wsa::IO_PENDING);
    }
    let answer = perform(socket.fd, &request).map_err(Failure::code)?;
    // One of them leaves the count as it is (W20).
    if control != Control::KeepAlive {
        call.returned.write_u32(answer.length()).map_err(|Fault| wsa::EFAULT)?;
    }
    complete_at_once(overlapped, &notification, &Outcome::Answered(answer));
    Ok(())
}

/// Checks the overlapped structure and who is to be told (contract S18, S31, W7).
pub(crate) fn notification(
    overlapped: Overlapped,
    routine: Option<CompletionRoutine>,
    target: Target,
) -> Result<Notification, i32> {
    overlapped.check().map_err(|Fault| wsa::EFAULT)?;
    let Some(routine) = routine else {
        let handle = overlapped.event().map_err(|Fault| wsa::EFAULT)?;
        // The lowest bit is a flag for completion ports (W37); an invalid handle is none.
        return Ok(Notification::Event(process().events.get(handle & !1)));
    };
    CallerPtr::of_routine(routine).read::<1>().map_err(|Fault| wsa::EFAULT)?;
    Ok(Notification::Routine { routine, queue: queue_of(target)? })
}

fn queue_of(target: Target) -> Result<Arc<Queue>, i32> {
    match target {
        Target::Named(id) if !id.is_null() => thread_of(id).ok_or(wsa::EFAULT),
        _ => thread::queue(),
    }
}

/// The queue of the living thread that a `WSATHREADID` names. The structure is read here and not
/// again (contract S24).
pub(crate) fn thread_of(id: CallerPtr) -> Option<Arc<Queue>> {
    let id: [u8; 2 * size_of::<usize>()] = id.read().ok()?;
    let handle = usize::from_ne_bytes(*id.first_chunk()?);
    process().threads.get(handle).filter(|queue| !queue.has_exited())
}

fn is_of_redirection(control: Control) -> bool {
    matches!(control, Control::QueryRecords | Control::QueryContext | Control::SetRecords)
}

/// Checks the arguments that the code has and copies what they point at.
fn request(call: &Call, socket: Socket, control: Control) -> Result<Request, Failure> {
    let fault = |Fault| Failure::Fault;
    let output = Output { place: call.output, length: call.output_length as usize };
    match control {
        Control::QueryRecords | Control::QueryContext => {
            // The state of a socket comes before the pointers.
            call.output
                .check_writable(output.length)
                .map_err(|Fault| check_state(socket.fd, control).err().unwrap_or(Failure::Fault))?;
            let option = match control {
                Control::QueryRecords => abi::QUERY_REDIRECT_RECORDS,
                _ => abi::QUERY_REDIRECT_CONTEXT,
            };
            Ok(Request::Query { option, output })
        }
        Control::SetRecords => {
            let record = input(call, 1)
                .and_then(|record| call.output.check_writable(output.length).map(|()| record))
                .map_err(|Fault| check_state(socket.fd, control).err().unwrap_or(Failure::Fault))?;
            // There is no output, and the size of it has to be zero (S9, X6).
            if output.length != 0 || call.input_length as usize > record.len() {
                return Err(Failure::Invalid);
            }
            Ok(Request::SetRecords(record))
        }
        Control::Flush => Ok(Request::Flush(socket)),
        Control::NonBlocking => {
            let [a, b, c, d, ..] = input(call, 4).map_err(fault)?[..] else {
                return Err(Failure::Fault);
            };
            Ok(Request::NonBlocking([a, b, c, d] != [0; 4]))
        }
        Control::KeepAlive => {
            let values = input(call, 12).map_err(fault)?;
            let value = |at: usize| {
                values.get(at..at + 4).and_then(|v| v.try_into().ok()).map_or(0, u32::from_ne_bytes)
            };
            Ok(Request::KeepAlive { on: value(0) != 0, idle_ms: value(4), interval_ms: value(8) })
        }
        Control::ReadableBytes => {
            output_of(output, 4)?;
            Ok(Request::ReadableBytes(output))
        }
        Control::EndpointHandle => {
            output_of(output, 8)?;
            Ok(Request::Value { bytes: socket.cookie.to_ne_bytes(), output })
        }
        Control::ExtensionFunction => {
            let guid = input(call, 16).map_err(fault)?;
            output_of(output, size_of::<usize>())?;
            let address = crate::message::extension_function(&guid).ok_or(Failure::Invalid)?;
            Ok(Request::Value { bytes: (address as u64).to_ne_bytes(), output })
        }
        Control::Malformed => Err(Failure::Invalid),
        Control::Unknown => Ok(Request::Unsupported),
    }
}

/// The input buffer: a fault too if it is shorter than needed (contract W22, W23, X12).
fn input(call: &Call, least: usize) -> Result<Vec<u8>, Fault> {
    let length = call.input_length as usize;
    if length < least { Err(Fault) } else { call.input.read_vec(length) }
}

/// An output buffer for a value of this length.
fn output_of(output: Output, length: usize) -> Result<(), Failure> {
    if output.length < length {
        return Err(Failure::Fault);
    }
    output.place.check_writable(output.length).map_err(|Fault| Failure::Fault)
}
