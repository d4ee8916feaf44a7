//! The headers against the library: every prototype has the signature of the exported function,
//! every structure its layout, every constant its value; and they stand whatever is included around
//! them.
#![cfg(target_os = "linux")]

use carnet_winsock::ffi::*;
use std::ffi::{c_char, c_int, c_long, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Checks here that the functions have these types, and gives them as text for C.
macro_rules! functions {
    ($($name:ident($($argument:ty),*) $(-> $result:ty)?;)*) => {{
        $(let _: unsafe extern "C" fn($($argument),*) $(-> $result)? = $name;)*
        vec![$((
            stringify!($name),
            vec![$(stringify!($argument)),*],
            concat!("" $(, stringify!($result))?),
        )),*]
    }};
}

type Function = (&'static str, Vec<&'static str>, &'static str);

type Routine = LPWSAOVERLAPPED_COMPLETION_ROUTINE;
type UserCall = LPWSAUSERAPC;
// Addresses of structures that the library reads and writes as bytes.
type Overlapped = *mut c_void;
type Message = *mut c_void;
type ThreadId = *mut c_void;
type Handle = *mut c_void;
type StartupData = *mut c_void;
type ProtocolA = *mut c_void;
type ProtocolW = *mut c_void;
type Sets = *mut c_void;
type Timeout = *const c_void;
type Handles = *const *mut c_void;
type Address = *mut libc::sockaddr;
type ConstAddress = *const libc::sockaddr;

fn functions() -> Vec<Function> {
    functions! {
        CancelIo(Handle) -> c_int;
        CancelIoEx(Handle, Overlapped) -> c_int;
        GetLastError() -> u32;
        SetLastError(u32);
        Sleep(u32);
        SleepEx(u32, c_int) -> u32;
        WPUCloseThread(ThreadId, *mut c_int) -> c_int;
        WPUCompleteOverlappedRequest(usize, Overlapped, u32, u32, *mut c_int) -> c_int;
        WPUOpenCurrentThread(ThreadId, *mut c_int) -> c_int;
        WPUQueueApc(ThreadId, UserCall, usize, *mut c_int) -> c_int;
        WSACancelBlockingCall() -> c_int;
        WSACleanup() -> c_int;
        WSACloseEvent(Handle) -> c_int;
        WSACreateEvent() -> Handle;
        WSAGetLastError() -> c_int;
        WSAGetOverlappedResult(usize, Overlapped, *mut u32, c_int, *mut u32) -> c_int;
        WSAIoctl(usize, u32, *mut c_void, u32, *mut c_void, u32, *mut u32, Overlapped, Routine)
            -> c_int;
        WSAIsBlocking() -> c_int;
        WSARecvMsg(usize, Message, *mut u32, Overlapped, Routine) -> c_int;
        WSAResetEvent(Handle) -> c_int;
        WSASendMsg(usize, Message, u32, *mut u32, Overlapped, Routine) -> c_int;
        WSASetEvent(Handle) -> c_int;
        WSASetLastError(c_int);
        WSASocketA(c_int, c_int, c_int, ProtocolA, u32, u32) -> usize;
        WSASocketW(c_int, c_int, c_int, ProtocolW, u32, u32) -> usize;
        WSAStartup(u16, StartupData) -> c_int;
        WSAWaitForMultipleEvents(u32, Handles, c_int, u32, c_int) -> u32;
        WSPIoctl(
            usize, u32, *mut c_void, u32, *mut c_void, u32, *mut u32, Overlapped, Routine, ThreadId,
            *mut c_int
        ) -> c_int;
        carnet_winsock_accept(usize, Address, *mut c_int) -> usize;
        carnet_winsock_bind(usize, ConstAddress, c_int) -> c_int;
        carnet_winsock_connect(usize, ConstAddress, c_int) -> c_int;
        carnet_winsock_getpeername(usize, Address, *mut c_int) -> c_int;
        carnet_winsock_getsockname(usize, Address, *mut c_int) -> c_int;
        carnet_winsock_getsockopt(usize, c_int, c_int, *mut c_char, *mut c_int) -> c_int;
        carnet_winsock_listen(usize, c_int) -> c_int;
        carnet_winsock_recv(usize, *mut c_char, c_int, c_int) -> c_int;
        carnet_winsock_recvfrom(usize, *mut c_char, c_int, c_int, Address, *mut c_int) -> c_int;
        carnet_winsock_select(c_int, Sets, Sets, Sets, Timeout) -> c_int;
        carnet_winsock_send(usize, *const c_char, c_int, c_int) -> c_int;
        carnet_winsock_sendto(usize, *const c_char, c_int, c_int, ConstAddress, c_int) -> c_int;
        carnet_winsock_setsockopt(usize, c_int, c_int, *const c_char, c_int) -> c_int;
        carnet_winsock_shutdown(usize, c_int) -> c_int;
        carnet_winsock_socket(c_int, c_int, c_int) -> usize;
        closesocket(usize) -> c_int;
        ioctlsocket(usize, c_long, *mut u32) -> c_int;
    }
}

/// The C type that stands for a Rust type: of a width where it is a number, of a structure where it
/// is an address of one.
fn c_type(rust: &str) -> &str {
    match rust {
        "" => "void",
        "u16" => "uint16_t",
        "u32" => "uint32_t",
        "usize" => "uintptr_t",
        "c_int" => "int",
        "c_long" => "long",
        "*mut u32" => "uint32_t *",
        "*mut c_int" => "int *",
        "*mut c_char" => "char *",
        "*const c_char" => "const char *",
        "*mut c_void" | "Handle" => "void *",
        "Handles" => "void *const *",
        "Routine" => "void (*)(uint32_t, uint32_t, struct _OVERLAPPED *, uint32_t)",
        "UserCall" => "void (*)(uintptr_t)",
        "Overlapped" => "struct _OVERLAPPED *",
        "Message" => "struct _WSAMSG *",
        "ThreadId" => "struct _WSATHREADID *",
        "StartupData" => "struct WSAData *",
        "ProtocolA" => "struct _WSAPROTOCOL_INFOA *",
        "ProtocolW" => "struct _WSAPROTOCOL_INFOW *",
        "Sets" => "struct carnet_winsock_fd_set *",
        "Timeout" => "const struct timeval *",
        "Address" => "struct sockaddr *",
        "ConstAddress" => "const struct sockaddr *",
        other => panic!("no C type for {other}"),
    }
}

const INCLUDES: &str = "#include <winsock2.h>\n#include <ws2tcpip.h>\n#include <mstcpip.h>\n\
                        #include <mswsock.h>\n#include <ws2spi.h>\n#include <windows.h>\n";

fn include() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("include")
}

/// Has the source checked by a compiler; not linked.
fn compile(name: &str, compiler: &str, options: &[&str], source: &str) {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let file = directory.join(name);
    std::fs::write(&file, source).expect("the directory for tests is writable");
    let output = Command::new(compiler)
        .args(["-Wall", "-Wextra", "-Werror", "-fsyntax-only"])
        .args(options)
        .arg("-I")
        .arg(include())
        .arg(&file)
        .output()
        .unwrap_or_else(|error| panic!("cannot start {compiler}: {error}; install gcc"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name}:\n{said}\n{source}");
}

#[test]
fn prototypes_are_the_exported_signatures() {
    let mut source = String::from(INCLUDES);
    for (name, arguments, result) in functions() {
        let arguments: Vec<_> = arguments.into_iter().map(c_type).collect();
        let arguments = if arguments.is_empty() { "void".into() } else { arguments.join(", ") };
        // The type has to be the very same, not one that converts.
        source += &format!(
            "_Static_assert(_Generic(&{name}, {} (*)({arguments}): 1, default: 0), \"{name}\");\n",
            c_type(result)
        );
    }
    compile("prototypes.c", "cc", &["-std=c11"], &source);
}

#[test]
fn every_prototype_is_in_the_list() {
    let names: Vec<_> = functions().into_iter().map(|(name, ..)| name).collect();
    let output = Command::new("cc")
        .args(["-E", "-P", "-x", "c", "-", "-I"])
        .arg(include())
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .and_then(|mut child| {
            use std::io::Write as _;
            child.stdin.take().unwrap().write_all(INCLUDES.as_bytes())?;
            child.wait_with_output()
        })
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    // What our headers declare, and no header of the system.
    let ours = |name: &str| {
        ["WSA", "WSP", "WPU", "Cancel", "carnet_winsock_"].iter().any(|p| name.starts_with(p))
            || ["closesocket", "ioctlsocket", "Sleep", "SleepEx", "GetLastError", "SetLastError"]
                .contains(&name)
    };
    let declared: std::collections::BTreeSet<_> = text
        .split(|c: char| !c.is_alphanumeric() && c != '_' && c != '(')
        .filter_map(|word| word.split_once('(').map(|(name, _)| name))
        .filter(|name| ours(name) && !name.starts_with("carnet_winsock_fd_"))
        .collect();
    assert!(declared.len() > 40, "{declared:?}");
    for name in declared {
        assert!(names.contains(&name), "{name} is declared, and not checked");
    }
}

#[test]
fn layouts_and_values_are_windows() {
    let mut source = String::from(INCLUDES);
    let mut assert = |what: &str| {
        source += &format!("_Static_assert({what}, \"{}\");\n", what.replace('"', "'"))
    };
    for (structure, size, fields) in [
        (
            "WSAOVERLAPPED",
            32,
            &[
                ("Internal", 0),
                ("InternalHigh", 8),
                ("Offset", 16),
                ("OffsetHigh", 20),
                ("hEvent", 24),
            ][..],
        ),
        ("WSATHREADID", 16, &[("ThreadHandle", 0), ("Reserved", 8)]),
        ("WSABUF", 16, &[("len", 0), ("buf", 8)]),
        (
            "WSAMSG",
            56,
            &[
                ("name", 0),
                ("namelen", 8),
                ("lpBuffers", 16),
                ("dwBufferCount", 24),
                ("Control", 32),
                ("dwFlags", 48),
            ],
        ),
        ("WSACMSGHDR", 16, &[("cmsg_len", 0), ("cmsg_level", 8), ("cmsg_type", 12)]),
        (
            "WSADATA",
            408,
            &[
                ("wHighVersion", 2),
                ("lpVendorInfo", 8),
                ("szDescription", 16),
                ("szSystemStatus", 273),
            ],
        ),
        (
            "struct tcp_keepalive",
            12,
            &[("onoff", 0), ("keepalivetime", 4), ("keepaliveinterval", 8)],
        ),
        ("GUID", 16, &[("Data2", 4), ("Data3", 6), ("Data4", 8)]),
        ("fd_set", 520, &[("fd_count", 0), ("fd_array", 8)]),
        ("struct timeval", 16, &[("tv_sec", 0), ("tv_usec", 8)]),
    ] {
        assert(&format!("sizeof({structure}) == {size}"));
        for (field, offset) in fields {
            assert(&format!("offsetof({structure}, {field}) == {offset}"));
        }
    }
    for (name, value) in [
        ("SIO_QUERY_WFP_CONNECTION_REDIRECT_RECORDS", "0x980000DC"),
        ("SIO_QUERY_WFP_CONNECTION_REDIRECT_CONTEXT", "0x980000DD"),
        ("SIO_SET_WFP_CONNECTION_REDIRECT_RECORDS", "0x980000DE"),
        ("SIO_QUERY_WFP_ALE_ENDPOINT_HANDLE", "0x580000CD"),
        ("SIO_KEEPALIVE_VALS", "0x98000004"),
        ("SIO_FLUSH", "0x28000004"),
        ("SIO_GET_EXTENSION_FUNCTION_POINTER", "0xC8000006"),
        ("FIONBIO", "0x8004667E"),
        ("FIONREAD", "0x4004667F"),
        ("FIOASYNC", "0x8004667D"),
        ("SO_ORIGINAL_DST", "0x300F"),
        ("IP_WFP_REDIRECT_RECORDS", "60"),
        ("IP_WFP_REDIRECT_CONTEXT", "70"),
        ("IPV6_WFP_REDIRECT_RECORDS", "60"),
        ("IPV6_WFP_REDIRECT_CONTEXT", "70"),
        ("WSA_FLAG_OVERLAPPED", "1"),
        ("WSA_MAXIMUM_WAIT_EVENTS", "64"),
        ("WSA_WAIT_IO_COMPLETION", "0xC0"),
        ("WSA_WAIT_TIMEOUT", "258"),
        ("WSA_WAIT_FAILED", "0xFFFFFFFF"),
        ("WSS_OPERATION_IN_PROGRESS", "0x103"),
        ("STATUS_PENDING", "0x103"),
        ("STATUS_BUFFER_TOO_SMALL", "0xC0000023"),
        ("STATUS_CANCELLED", "0xC0000120"),
        ("STATUS_NOT_SUPPORTED", "0xC00000BB"),
        ("STATUS_FWP_NOT_FOUND", "0xC0220008"),
        ("FWP_E_NOT_FOUND", "-2144206840"),
        ("INVALID_SOCKET", "UINTPTR_MAX"),
        ("SOCKET_ERROR", "-1"),
        ("ERROR_INSUFFICIENT_BUFFER", "122"),
        ("WSA_INVALID_HANDLE", "6"),
        ("WSA_INVALID_PARAMETER", "87"),
        ("WSA_OPERATION_ABORTED", "995"),
        ("WSA_IO_INCOMPLETE", "996"),
        ("WSA_IO_PENDING", "997"),
        ("WSAEINTR", "10004"),
        ("WSAEACCES", "10013"),
        ("WSAEFAULT", "10014"),
        ("WSAEINVAL", "10022"),
        ("WSAEWOULDBLOCK", "10035"),
        ("WSAEINPROGRESS", "10036"),
        ("WSAENOTSOCK", "10038"),
        ("WSAEMSGSIZE", "10040"),
        ("WSAENOPROTOOPT", "10042"),
        ("WSAEOPNOTSUPP", "10045"),
        ("WSAENETDOWN", "10050"),
        ("WSAENOBUFS", "10055"),
        ("WSAEISCONN", "10056"),
        ("WSAENOTCONN", "10057"),
        ("WSAETIMEDOUT", "10060"),
        ("WSAECONNREFUSED", "10061"),
        ("WSANOTINITIALISED", "10093"),
        ("sizeof(DWORD)", "4"),
        ("sizeof(u_long)", "4"),
        ("sizeof(LONG)", "4"),
        ("sizeof(SOCKET)", "8"),
        ("sizeof(HANDLE)", "8"),
        ("MAKEWORD(2, 1)", "0x0102"),
        ("LOBYTE(0x0102)", "2"),
        ("WSA_CMSG_LEN(5)", "21"),
        ("WSA_CMSG_SPACE(5)", "24"),
    ] {
        assert(&format!("{name} == {value}"));
    }
    compile("values.c", "cc", &["-std=c11"], &source);
}

/// A program that uses the names that both systems have.
const PROGRAM: &str = r#"
int main(void)
{
    WSADATA data;
    fd_set set;
    u_long on = 1;
    struct sockaddr_storage peer;
    socklen_t length = sizeof(peer);
    struct timeval timeout = {1, 0};
    SOCKET s;
    if (WSAStartup(MAKEWORD(2, 2), &data) != 0)
        return 1;
    s = socket(AF_INET6, SOCK_STREAM, IPPROTO_TCP);
    if (s == INVALID_SOCKET || ioctlsocket(s, FIONBIO, &on) == SOCKET_ERROR)
        return WSAGetLastError();
    FD_ZERO(&set);
    FD_SET(s, &set);
    if (select(0, &set, NULL, NULL, &timeout) > 0 && FD_ISSET(s, &set))
        s = accept(s, (struct sockaddr *)&peer, &length);
    FD_CLR(s, &set);
    return closesocket(s) + WSACleanup();
}
"#;

#[test]
fn programs_compile_in_any_dialect_and_order() {
    let system = "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n#include <errno.h>\n\
                  #include <sys/socket.h>\n#include <netinet/in.h>\n#include <arpa/inet.h>\n\
                  #include <sys/ioctl.h>\n#include <sys/select.h>\n#include <unistd.h>\n";
    for (name, before, after) in
        [("alone", "", ""), ("after_system", system, ""), ("before_system", "", system)]
    {
        let source = format!("{before}{INCLUDES}{after}{PROGRAM}");
        for dialect in ["-std=c11", "-std=gnu11", "-std=gnu17"] {
            compile(&format!("{name}{dialect}.c"), "cc", &[dialect, "-Wpedantic"], &source);
        }
    }
    let source = format!("{INCLUDES}{PROGRAM}");
    compile("dialect.cc", "c++", &["-std=c++17"], &source);
    // A program of its own number of sockets, as on Windows.
    let many = "_Static_assert(FD_SETSIZE == 500 && sizeof(fd_set) == 8 + 500 * 8, \"\");";
    let source = format!("#define FD_SETSIZE 500\n{INCLUDES}{many}{PROGRAM}");
    compile("fd_setsize.c", "cc", &["-std=gnu11"], &source);
}

/// A header alone is enough.
#[test]
fn every_header_includes_what_it_needs() {
    for entry in std::fs::read_dir(include()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let source = format!("#include <{name}>\n#include <{name}>\ntypedef DWORD used;\n");
        compile(&format!("{name}.c"), "cc", &["-std=c11", "-Wpedantic"], &source);
    }
}
