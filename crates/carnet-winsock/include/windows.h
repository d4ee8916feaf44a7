/*
 * The part of <windows.h> that a redirect service needs: Windows' basic types, with Windows' sizes,
 * and the few functions of kernel32 that go with Winsock.
 *
 * Carnet, https://github.com/carnet-project/carnet; MIT or Apache-2.0.
 */
#ifndef CARNET_WINSOCK_WINDOWS_H
#define CARNET_WINSOCK_WINDOWS_H

/* Before the definitions below: sys/types.h has an u_long of its own, which is a long. */
#include <sys/types.h>

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Windows' calling conventions and annotations mean nothing here. */
#define WINAPI
#define CALLBACK
#define APIENTRY
#define PASCAL
#define FAR
#define NEAR
#ifndef CONST
#define CONST const
#endif
#ifndef VOID
#define VOID void
#endif
#ifndef FALSE
#define FALSE 0
#endif
#ifndef TRUE
#define TRUE 1
#endif

typedef int BOOL, *PBOOL, *LPBOOL;
typedef uint8_t BYTE, *PBYTE, *LPBYTE;
typedef unsigned char UCHAR, *PUCHAR;
typedef char CHAR, *PCHAR, *LPSTR, *PSTR;
typedef const char *LPCSTR, *PCSTR;
typedef uint16_t WORD, *PWORD, *LPWORD;
typedef int16_t SHORT;
typedef uint16_t USHORT;
typedef int INT, *PINT, *LPINT;
typedef unsigned int UINT, *PUINT;
typedef int32_t LONG, *PLONG, *LPLONG;
typedef uint32_t ULONG, *PULONG;
typedef uint32_t DWORD, *PDWORD, *LPDWORD;
typedef int64_t LONGLONG, LONG64, INT64;
typedef uint64_t ULONGLONG, ULONG64, DWORD64, UINT64;
typedef uint32_t UINT32, ULONG32, DWORD32;
typedef intptr_t INT_PTR, LONG_PTR, SSIZE_T;
typedef uintptr_t UINT_PTR, ULONG_PTR, DWORD_PTR, SIZE_T, *PULONG_PTR, *PDWORD_PTR, *PSIZE_T;
typedef void *PVOID, *LPVOID;
typedef const void *LPCVOID;
/* An opaque value, never the address of anything. */
typedef void *HANDLE, **PHANDLE, **LPHANDLE;
typedef LONG NTSTATUS;

/* 32 bits wide on Windows and therefore here. Macros, since sys/types.h has the names. */
#define u_long ULONG
#define u_short USHORT
#define u_int UINT
#define u_char UCHAR

#ifndef GUID_DEFINED
#define GUID_DEFINED
typedef struct _GUID {
    ULONG Data1;
    USHORT Data2;
    USHORT Data3;
    UCHAR Data4[8];
} GUID, *LPGUID;
#endif

/* Set to zero before each use; valid until the operation has completed. */
typedef struct _OVERLAPPED {
    ULONG_PTR Internal;
    ULONG_PTR InternalHigh;
    DWORD Offset;
    DWORD OffsetHigh;
    HANDLE hEvent;
} OVERLAPPED, *POVERLAPPED, *LPOVERLAPPED;

#define HasOverlappedIoCompleted(overlapped) \
    (((volatile OVERLAPPED *)(overlapped))->Internal != STATUS_PENDING)

#define INVALID_HANDLE_VALUE ((HANDLE)(LONG_PTR)-1)
#define INFINITE 0xFFFFFFFFu

#define MAKEWORD(low, high) \
    ((WORD)(((BYTE)(((DWORD_PTR)(low)) & 0xff)) | ((WORD)((BYTE)(((DWORD_PTR)(high)) & 0xff))) << 8))
#define LOBYTE(word) ((BYTE)(((DWORD_PTR)(word)) & 0xff))
#define HIBYTE(word) ((BYTE)((((DWORD_PTR)(word)) >> 8) & 0xff))
#define UNREFERENCED_PARAMETER(parameter) ((void)(parameter))
#define ZeroMemory(destination, length) __builtin_memset((destination), 0, (length))

#define WAIT_OBJECT_0 0u
#define WAIT_IO_COMPLETION 0xC0u
#define WAIT_TIMEOUT 258u
#define WAIT_FAILED 0xFFFFFFFFu

#define ERROR_SUCCESS 0
#define NO_ERROR 0
#define ERROR_INVALID_HANDLE 6
#define ERROR_NOT_ENOUGH_MEMORY 8
#define ERROR_NOT_SUPPORTED 50
#define ERROR_INVALID_PARAMETER 87
#define ERROR_INSUFFICIENT_BUFFER 122
#define ERROR_OPERATION_ABORTED 995
#define ERROR_IO_INCOMPLETE 996
#define ERROR_IO_PENDING 997
#define ERROR_NOACCESS 998
#define ERROR_NOT_FOUND 1168

#define STATUS_SUCCESS ((DWORD)0x00000000)
#define STATUS_PENDING ((DWORD)0x00000103)
#define STATUS_ACCESS_VIOLATION ((DWORD)0xC0000005)
#define STATUS_INVALID_HANDLE ((DWORD)0xC0000008)
#define STATUS_INVALID_PARAMETER ((DWORD)0xC000000D)
#define STATUS_NO_SUCH_DEVICE ((DWORD)0xC000000E)
#define STATUS_ACCESS_DENIED ((DWORD)0xC0000022)
#define STATUS_BUFFER_TOO_SMALL ((DWORD)0xC0000023)
#define STATUS_INTEGER_OVERFLOW ((DWORD)0xC0000095)
#define STATUS_INSUFFICIENT_RESOURCES ((DWORD)0xC000009A)
#define STATUS_NOT_SUPPORTED ((DWORD)0xC00000BB)
#define STATUS_CANCELLED ((DWORD)0xC0000120)
#define STATUS_INVALID_CONNECTION ((DWORD)0xC0000140)
#define STATUS_NOT_FOUND ((DWORD)0xC0000225)
#define STATUS_FWP_NOT_FOUND ((DWORD)0xC0220008)
#define FWP_E_NOT_FOUND ((LONG)0x80320008)

/* The thread's last error: the same as Winsock's. */
DWORD GetLastError(void);
void SetLastError(DWORD dwErrCode);

/* Sleeps dwMilliseconds (INFINITE: for ever). SleepEx with bAlertable also runs the completion
 * routines that are due in this thread, and then returns WAIT_IO_COMPLETION at once. */
void Sleep(DWORD dwMilliseconds);
DWORD SleepEx(DWORD dwMilliseconds, BOOL bAlertable);

/* hFile is a SOCKET. CancelIo: what the calling thread began on it. CancelIoEx: what any thread
 * began, or with an lpOverlapped that one operation; ERROR_NOT_FOUND if there is none. */
BOOL CancelIo(HANDLE hFile);
BOOL CancelIoEx(HANDLE hFile, LPOVERLAPPED lpOverlapped);

#ifdef __cplusplus
}
#endif

#endif
