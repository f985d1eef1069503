//go:build clockstep

#include "textflag.h"

// func steppedAddr() uintptr
TEXT ·steppedAddr(SB),NOSPLIT,$0-8
	LEAQ	·stepped(SB), AX
	MOVQ	AX, ret+0(FP)
	RET

// int stepped(clockid_t DI, struct timespec *SI), called on the stack that the runtime keeps for C.
TEXT ·stepped(SB),NOSPLIT|NOFRAME,$0
	SUBQ	$24, SP // keeps C's alignment
	MOVQ	DI, 0(SP)
	MOVQ	SI, 8(SP)
	MOVQ	·kernels(SB), AX
	CALL	AX
	MOVQ	0(SP), DI
	MOVQ	8(SP), SI
	CMPL	DI, $0 // CLOCK_REALTIME
	JNE	done
	MOVQ	·offset(SB), CX
	ADDQ	CX, 0(SI)
done:
	ADDQ	$24, SP
	RET
